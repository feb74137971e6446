"""The operators' implementations on CUDA devices: kernels where there is one, the reference for the rest.

Registered by *lower* for the first graph that runs on such a device. An operator's meaning is its reference: codes, scales and amax
are equal bit for bit, products within the bound of another order of sums.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.errors import FP8Warning
from fp8fx.kernels import cast as kernel
from fp8fx.kernels import scaled_mm
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.kernels.replay import taped
from fp8fx.ops import casts
from fp8fx.ops import linear as linear_op
from fp8fx.ops import quantize as quantize_op
from fp8fx.ops.inductor import FORMATS, torch_has
from fp8fx.ops.library import LIBRARY, REFERENCES, without_autocast
from fp8fx.ops.operands import forward_operand
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.ops.scaled_mm import scaled_mm_reference
from fp8fx.spec import SiteSpec, TensorSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NONFINITE = kernel.Rounding(overflow="nonfinite")
SAMPLED = 256  # rows of a gradient that the underflow counts look at: a share of them is enough for a warning


@functools.lru_cache(maxsize=4096)
def _key(site: str, role: str) -> int:
    return numerics.producer_key(site, role)


def _rounding(spec: TensorSpec, rng: Tensor | None, site: str, role: str) -> kernel.Rounding:
    if not spec.stochastic:
        return kernel.NEAREST if spec.overflow == "saturate" else NONFINITE
    return kernel.Rounding(spec.rounding, spec.overflow, rng, _key(site, role))


def _has_kernel(x: Tensor, spec: TensorSpec) -> bool:
    return spec.format in FORMATS and spec.rounding in ("nearest_even", "stochastic") and spec.on_hardware and x.dtype in DTYPES


def cast(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed):
        return casts.cast_reference(x, spec, rng, site, role, scale, record, layout)
    matrix = x if x.dim() == 2 else as_matrix(x)
    how, counts = _rounding(parsed, rng, site, role), record is not None and role == casts.GRADIENT
    return _laid_out(x, *kernel.cast(matrix, parsed.format, scale, "tensor", layout, how, None, record, counts))


def _laid_out(x: Tensor, q: Tensor | None, q_t: Tensor | None) -> tuple[Tensor, Tensor]:
    """q in the shape of x and q_t as its transpose; without elements where it was not made."""
    if q is None:
        assert q_t is not None
        return q_t.new_empty(0), q_t.mT
    return q if q.dim() == x.dim() else q.view(x.shape), q.new_empty(0) if q_t is None else q_t.mT


def cast_current(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed):
        return casts.cast_current_reference(x, spec, rng, site, role, record, layout)
    matrix = x if x.dim() == 2 else as_matrix(x)
    how, block = _rounding(parsed, rng, site, role), parsed.granularity
    if isinstance(block, str):
        side, other = ("row", "column") if block == "row" else ("tensor", None)
        counts = record is not None and role == casts.GRADIENT
        made = kernel.cast_current(matrix, parsed.format, side, other, layout, how, parsed.power_of_two, parsed.eps, record, counts)
    else:
        made = cast_block(matrix, parsed.format, block, None, layout, how, parsed.power_of_two, parsed.eps)
    nothing = x.new_empty(0, dtype=torch.float32)
    scale = made.scale if made.scale is not None else nothing
    scale_t = made.scale_t if made.scale_t is not None else nothing
    if block == "tensor":
        scale, scale_t = (scale if made.scale is not None else scale_t), nothing
    elif made.scale is not None:
        scale = scale.view(casts.scale_shapes(x, parsed, "rows")[0])
    return *_laid_out(x, made.q, made.q_t), scale, scale_t


def quantize(
    x: Tensor, spec: str, dims: list[int], rng: Tensor | None = None, site: str = "", role: str = "", scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed) or parsed.granularity != "tensor":
        return quantize_op.quantize_reference(x, spec, dims, rng, site, role, scale)
    how = _rounding(parsed, rng, site, role)
    if scale is None and parsed.scaling == "current":
        made = kernel.cast_current(x, parsed.format, how=how, power_of_two=parsed.power_of_two, eps=parsed.eps)
        assert made.q is not None
        assert made.scale is not None
        assert made.amax is not None
        return made.q, made.scale, made.amax
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    used = torch.ones((), dtype=torch.float32, device=x.device) if scale is None else scale.clone()
    q, _ = kernel.cast(x, parsed.format, None if scale is None else used, how=how, amax=amax)
    assert q is not None
    return q, used, amax


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def scaled(
    a: Tensor,
    scale_a: Tensor | None,
    format_a: str,
    block_a: list[int],
    b: Tensor,
    scale_b: Tensor | None,
    format_b: str,
    block_b: list[int],
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulate: str = "precise",
) -> Tensor:
    if format_a not in FORMATS or format_b not in FORMATS or dtype not in DTYPES:
        return scaled_mm_reference(a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, dtype)
    scale_a = _one(a.device) if scale_a is None else scale_a
    scale_b = _one(b.device) if scale_b is None else scale_b
    aligned = (a.data_ptr() | b.data_ptr()) % 16 == 0
    if aligned and torch_has(a, scale_a, b, scale_b, bias, dtype, bool(block_a or block_b)):
        return torch._scaled_mm(a, b, scale_a, scale_b, bias, None, dtype, accumulate == "fast")
    along_k = [block[i] for block, i in ((block_a, 1), (block_b, 0)) if block]
    if along_k and math.gcd(*along_k, 128) < 32:  # no kernel has such blocks
        return scaled_mm_reference(a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, dtype)
    blocks = (tuple(block_a) or None, tuple(block_b) or None)
    return scaled_mm.scaled_mm(a, b, scale_a, scale_b, bias, dtype, accumulate, *blocks)  # type: ignore[arg-type]


def linear(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    input_spec, weight_spec, backward, dtype = rest[-4:]
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms or not input or not weight:
        return linear_op.linear_reference(x, w, b, input, weight, *rest)
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    if x.dim() == 2:
        return scaled(*left.arguments(), *right.arguments(), b, dtype, spec.accumulate[0])
    scale = left.scale if left.scale is None or left.scale.dim() == 0 else left.scale.view(-1, left.scale.shape[-1])
    values, _, format, block = left.arguments()
    y = scaled(as_matrix(values), scale, format, block, *right.arguments(), b, dtype, spec.accumulate[0])
    return y.view(*x.shape[:-1], y.shape[-1])


def meter_row(x: Tensor, q: Tensor | None, spec: str, *amax: Tensor | None) -> Tensor:
    """The counts come from evenly spaced rows: reading every gradient again would cost half as much as quantizing it."""
    if q is not None and x.dim() > 1 and x.shape[0] > SAMPLED:
        step = x.shape[0] // SAMPLED
        x, q = x[::step], q[::step]
    return quantize_op.meter_row_reference(x, q, spec, *amax)


def act_linear(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    input: list[Tensor],
    weight1: list[Tensor],
    weight2: list[Tensor],
    record1: Tensor | None,
    record2: Tensor | None,
    scales1: Tensor | None,
    scales2: Tensor | None,
    scale: Tensor | None,
    record: Tensor | None,
    rng: Tensor | None,
    activation: str,
    site1: str,
    site2: str,
    input_spec: str,
    weight1_spec: str,
    weight2_spec: str,
    backward1: str,
    backward2: str,
    spec: str,
    site: str,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    h = linear(x, w1, b1, input, weight1, None, None, rng, site1, input_spec, weight1_spec, backward1, dtype)
    u = None
    if w2 is not None:
        u = linear(x, w2, b2, input, weight2, None, None, rng, site2, input_spec, weight2_spec, backward2, dtype)
    codes = _ACT_CAST(as_matrix(h), None if u is None else as_matrix(u), activation, spec, rng, site, scale, record, layout)
    q, qt, made = codes
    q = q if layout == "transposed" else q.view(h.shape)
    return make_anchor(h.shape, h.dtype, h.device), q, qt, made, h, h.new_empty(0) if u is None else u


def _act_cast(
    h: Tensor,
    u: Tensor | None,
    activation: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, qt and scale (no elements where it is given, or 1) of act(h) * u [M, H]."""
    parsed = TensorSpec.parse(spec)
    how, made = _rounding(parsed, rng, site, "input"), h.new_empty(1 if parsed.scaling == "current" else 0, dtype=torch.float32)
    current = parsed.scaling == "current"
    given = activation_amax(h, u, activation) if current else scale if parsed.scaling == "delayed" else None
    q, q_t = activation_cast(
        h, u, activation, parsed.format, given, layout, how, record=record, from_amax=current, made_scale=made if current else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    return *_laid_out(h, q, q_t), made.view(()) if current else made


def act_backward_cast(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    activation: str,
    rng: Tensor | None,
    site1: str,
    site2: str,
    spec: str,
    scale1: Tensor | None,
    scale2: Tensor | None,
    record1: Tensor | None,
    record2: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    parsed, gated = TensorSpec.parse(spec), u.dim() > 1
    current, other = parsed.scaling == "current", u if gated else None
    hows = _rounding(parsed, rng, site1, casts.GRADIENT), _rounding(parsed, rng, site2, casts.GRADIENT)
    made = [grad.new_empty(1 if current and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    totals = [grad.new_empty(h.shape[-1] if sums and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    given: Any = (scale1, scale2) if parsed.scaling == "delayed" else (None, None)
    if current:
        given = activation_backward_amax(grad, h, other, activation)
    first, second = activation_backward_cast(
        grad, h, other, activation, parsed.format, given[0], given[1], layout, hows[0], hows[1], record=record1,
        record_u=record2 if gated else None,
        counts=record1 is not None, bias_grad=totals[0] if sums else None, bias_grad_u=totals[1] if sums and gated else None,
        from_amax=current, made_scale=made[0] if current else None, made_scale_u=made[1] if current and gated else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    q, qt = _laid_out(grad, *first)
    q_u, qt_u = _laid_out(grad, *second) if gated else (q.new_empty(0), q.new_empty(0))
    scales = [part.view(()) if part.numel() else part for part in made]
    return q, qt, scales[0], q_u, qt_u, scales[1], *totals


_ACT_CAST = taped(_act_cast)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": taped(quantize),
    "cast": taped(cast),
    "cast_current": taped(cast_current),
    "act_linear": act_linear,
    "act_backward_cast": taped(act_backward_cast),
    "scaled_mm": scaled,
    "linear": linear,
    "meter_row": meter_row,
}


KERNELS_ONLY = ("cast", "cast_current", "act_backward_cast")  # nothing in them that an autocast region would change


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and the operator's reference where a kernel of it does not compile: with a warning, and training goes on."""
    reference = without_autocast(REFERENCES[name])

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KernelCompileError as error:
            _warn(f"fp8fx::{name}: {error}")
        return reference(*args, **kwargs)

    return run


@functools.cache
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, FP8Warning, stacklevel=3)


@functools.cache
def register() -> None:
    """For CUDA tensors these run in place of the references, from the first call of this on."""
    for name, function in IMPLEMENTATIONS.items():
        function = function if name in KERNELS_ONLY else without_autocast(function)
        LIBRARY.impl(name, guarded(name, function), "CUDA")
