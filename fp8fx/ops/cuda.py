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

from fp8fx.errors import FP8Warning
from fp8fx.kernels import scaled_mm
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.kernels.replay import taped
from fp8fx.kernels.rounding import NEAREST, Rounding
from fp8fx.ops import act as act_op
from fp8fx.ops import casts
from fp8fx.ops import linear as linear_op
from fp8fx.ops import quantize as quantize_op
from fp8fx.ops.act import KEPT
from fp8fx.ops.act_linear import kept_in_fp8
from fp8fx.ops.cuda_casts import DTYPES, cast, cast_amax, cast_current, has_kernel, laid_out, quantize, round_values, rounding_of
from fp8fx.ops.cuda_norms import norm_backward, norm_cast
from fp8fx.ops.inductor import FORMATS, torch_has
from fp8fx.ops.library import LIBRARY, REFERENCES, without_autocast
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.operands import forward_operand
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.ops.rounded_mm import rounds_in_place
from fp8fx.ops.scaled_mm import scaled_mm_reference
from fp8fx.spec import SiteSpec, TensorSpec

SAMPLED = 256  # rows of a gradient that the underflow counts look at: a share of them is enough for a warning


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
    one_a, one_b = (_one(a.device) if scale is None else scale for scale in (scale_a, scale_b))
    aligned = (a.data_ptr() | b.data_ptr()) % 16 == 0
    if aligned and torch_has(a, one_a, b, one_b, bias, dtype, bool(block_a or block_b)):
        return torch._scaled_mm(a, b, one_a, one_b, bias, None, dtype, accumulate == "fast")
    if not _has_blocks(block_a, block_b):
        return scaled_mm_reference(a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, dtype)
    return _OWN_PRODUCT(a, scale_a, tuple(block_a) or None, b, scale_b, tuple(block_b) or None, bias, dtype, accumulate, None, None)[0]


def _own_product(
    a: Tensor,
    scale_a: Tensor | None,
    block_a: Any,
    b: Tensor,
    scale_b: Tensor | None,
    block_b: Any,
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulate: str,
    round_to: str | None,
    rng: Tensor | None,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    key: int = 0,
) -> tuple[Tensor, ...]:
    """The project's own kernel; (y,)."""
    scale_a, scale_b = (_one(a.device) if scale is None else scale for scale in (scale_a, scale_b))
    how = Rounding(rounding, overflow, rng, key)
    return (scaled_mm.scaled_mm(a, b, scale_a, scale_b, bias, dtype, accumulate, block_a, block_b, round_to=round_to, how=how),)


_OWN_PRODUCT = taped(_own_product)


def _has_blocks(block_a: list[int], block_b: list[int]) -> bool:
    along_k = [block[i] for block, i in ((block_a, 1), (block_b, 0)) if block]
    return not along_k or math.gcd(*along_k, 128) >= 32


def rounded(
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
    accumulate: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    role: str,
) -> Tensor:
    parsed = TensorSpec.parse(spec)
    codes = format_a in FORMATS and format_b in FORMATS and dtype in DTYPES and _has_blocks(block_a, block_b)
    if not codes or not has_kernel(a, parsed, (a.dtype,)) or not rounds_in_place(parsed):
        sums = scaled(a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, torch.float32, accumulate)
        return round_values(sums, spec, rng, site, role)[0].to(dtype)
    how = rounding_of(parsed, rng, site, role)
    blocks = tuple(block_a) or None, tuple(block_b) or None
    operands = (a, scale_a, blocks[0], b, scale_b, blocks[1], bias, dtype, accumulate)
    return _OWN_PRODUCT(*operands, parsed.format, how.rng, how.rounding, how.overflow, how.key)[0]


def linear(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    input_spec, weight_spec, backward, dtype = rest[-4:]
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms or not input or not weight:
        return linear_op.linear_reference(x, w, b, input, weight, *rest)
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    scale = left.scale if x.dim() == 2 or left.scale is None or left.scale.dim() == 0 else left.scale.view(-1, left.scale.shape[-1])
    values, _, format, block = left.arguments()
    values = values if x.dim() == 2 else as_matrix(values)
    operands: Any = (values, scale, format, block, *right.arguments(), b, dtype, spec.accumulate[0])
    ending: Any = () if spec.output is None else (spec.output.text, rest[2], rest[3], "output")  # spec, rng, site, role
    y = rounded(*operands, *ending) if ending else scaled(*operands)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


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
    kept = kept_in_fp8(backward1)
    codes = _ACT_CAST(as_matrix(h), None if u is None else as_matrix(u), activation, spec, rng, site, scale, record, layout, kept)
    q, qt, made, q_h, q_u, block_h, block_u = codes
    q = q if layout == "transposed" else q.view(h.shape)
    if not kept:
        q_h, q_u = h, q_u if u is None else u
    return make_anchor(h.shape, h.dtype, h.device), q, qt, made, q_h, q_u, block_h, block_u


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
    keep: bool,
) -> tuple[Tensor, ...]:
    """q, qt and scale (no elements where it is given, or 1) of act(h) * u [M, H]; codes of h and u and their scales, if `keep`."""
    parsed = TensorSpec.parse(spec)
    how, made = rounding_of(parsed, rng, site, "input"), h.new_empty(1 if parsed.scaling == "current" else 0, dtype=torch.float32)
    current = parsed.scaling == "current"
    given = activation_amax(h, u, activation) if current else scale if parsed.scaling == "delayed" else None
    kept = (Kept.empty(h), None if u is None else Kept.empty(u)) if keep else None
    q, q_t = activation_cast(
        h, u, activation, parsed.format, given, layout, how, record=record, from_amax=current, made_scale=made if current else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps, kept=kept,
    )  # fmt: skip
    parts = [(h.new_empty(0), made.new_empty(0)) if part is None else part for part in (kept or (None, None))]
    if keep and u is None:
        parts[1] = h.new_empty(0, dtype=torch.uint8), made.new_empty(0)
    return *laid_out(h, q, q_t), made.view(()) if current else made, parts[0][0], parts[1][0], parts[0][1], parts[1][1]


def act(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """Not fused: torch's own activation, and a cast of h and u."""
    y = ACTIVATIONS[activation][0](h)
    return y if u is None else y * u, *_keep(h, h), *_keep(u, h)


def _keep(x: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if x is None or x.dtype not in DTYPES:
        return act_op.keep(x, like)
    made = cast_block(as_matrix(x), KEPT.format, (1, act_op.SIDE), None, "rows", NEAREST, KEPT.power_of_two, KEPT.eps)
    assert made.q is not None
    assert made.scale is not None
    return made.q.view(torch.uint8), made.scale


def act_backward(
    grad: Tensor, q_h: Tensor, scale_h: Tensor, q_u: Tensor | None, scale_u: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    forward, backward = ACTIVATIONS[activation]
    h = _restore(q_h, scale_h, grad)
    if q_u is None or scale_u is None:
        return backward(grad, h), grad.new_empty(0)
    du = grad * forward(h)
    return backward(grad * _restore(q_u, scale_u, grad), h), du


def _restore(q: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """In like's dtype throughout: bfloat16 holds codes, powers of two and their products. The reference where that is not so."""
    m, k = q.shape
    if like.dtype == torch.float16 or k % act_op.SIDE:
        return act_op.restore(q, scale, like.dtype).view(like.shape)
    values = q.view(torch.float8_e4m3fn).to(like.dtype).view(m, k // act_op.SIDE, act_op.SIDE)
    return values.mul_(scale.to(like.dtype).unsqueeze(-1)).view(like.shape)


def _kept(x: Tensor, block: Tensor | None) -> Tensor | Kept:
    return x if block is None else Kept(x, block)


def act_backward_cast(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    block_h: Tensor | None,
    block_u: Tensor | None,
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
    current, gate, other = parsed.scaling == "current", _kept(h, block_h), _kept(u, block_u) if gated else None
    hows = rounding_of(parsed, rng, site1, casts.GRADIENT), rounding_of(parsed, rng, site2, casts.GRADIENT)
    made = [grad.new_empty(1 if current and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    totals = [grad.new_empty(h.shape[-1] if sums and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    given: Any = (scale1, scale2) if parsed.scaling == "delayed" else (None, None)
    if current:
        given = activation_backward_amax(grad, gate, other, activation)
    first, second = activation_backward_cast(
        grad, gate, other, activation, parsed.format, given[0], given[1], layout, hows[0], hows[1], record=record1,
        record_u=record2 if gated else None,
        counts=record1 is not None, bias_grad=totals[0] if sums else None, bias_grad_u=totals[1] if sums and gated else None,
        from_amax=current, made_scale=made[0] if current else None, made_scale_u=made[1] if current and gated else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    q, qt = laid_out(grad, *first)
    q_u, qt_u = laid_out(grad, *second) if gated else (q.new_empty(0), q.new_empty(0))
    scales = [part.view(()) if part.numel() else part for part in made]
    return q, qt, scales[0], q_u, qt_u, scales[1], *totals


def act_backward_gate(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    block_h: Tensor | None,
    block_u: Tensor | None,
    activation: str,
    rng: Tensor | None,
    site: str,
    spec: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    parsed, gate, other = TensorSpec.parse(spec), _kept(h, block_h), _kept(u, block_u) if u.dim() > 1 else None
    current, how = parsed.scaling == "current", rounding_of(parsed, rng, site, casts.GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(h.shape[-1] if sums else 0, dtype=torch.float32)
    given, amax_u = scale if parsed.scaling == "delayed" else None, grad.new_empty(0, dtype=torch.float32)
    if current:
        amax_u = grad.new_zeros(1, dtype=torch.float32) if other is not None else amax_u
        given, _ = activation_backward_amax(
            grad, gate, other, activation, grad.new_zeros(1, dtype=torch.float32), None if other is None else amax_u
        )
    first, _ = activation_backward_cast(
        grad, gate, other, activation, parsed.format, given, None, layout, how, record=record, counts=record is not None,
        bias_grad=total if sums else None, from_amax=current, made_scale=made if current else None, power_of_two=parsed.power_of_two,
        eps=parsed.eps, only=True,
    )  # fmt: skip
    return *laid_out(grad, *first), made.view(()) if current else made, total, amax_u


def act_backward_up(
    grad: Tensor,
    h: Tensor,
    block_h: Tensor | None,
    activation: str,
    rng: Tensor | None,
    site: str,
    spec: str,
    scale: Tensor | None,
    amax: Tensor | None,
    record: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """du = act(h) * da is what forward makes of h and u, to the bit."""
    parsed, gate = TensorSpec.parse(spec), _kept(h, block_h)
    current, how = parsed.scaling == "current", rounding_of(parsed, rng, site, casts.GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(h.shape[-1] if sums else 0, dtype=torch.float32)
    given = amax if current else scale if parsed.scaling == "delayed" else None
    pair = activation_cast(
        gate, grad, activation, parsed.format, given, layout, how, record=record, counts=record is not None, from_amax=current,
        made_scale=made if current else None, power_of_two=parsed.power_of_two, eps=parsed.eps, bias_grad=total if sums else None,
    )  # fmt: skip
    return *laid_out(grad, *pair), made.view(()) if current else made, total


_ACT_CAST = taped(_act_cast)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": taped(quantize),
    "cast": taped(cast),
    "cast_current": taped(cast_current),
    "cast_amax": taped(cast_amax),
    "act": act,
    "act_backward": act_backward,
    "act_linear": act_linear,
    "act_backward_cast": taped(act_backward_cast),
    "act_backward_gate": taped(act_backward_gate),
    "act_backward_up": taped(act_backward_up),
    "norm_cast": norm_cast,
    "norm_backward": taped(norm_backward),
    "scaled_mm": scaled,
    "rounded_mm": rounded,
    "round_values": taped(round_values),
    "linear": linear,
    "meter_row": meter_row,
}


KERNELS_ONLY = (  # nothing in them that an autocast region would change
    "cast",
    "cast_current",
    "cast_amax",
    "act_backward_cast",
    "act_backward_gate",
    "act_backward_up",
)


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
