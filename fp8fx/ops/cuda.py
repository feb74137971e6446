"""The operators' implementations on CUDA devices: kernels where there is one, the reference for the rest.

Registered by *lower* for the first graph that runs on such a device. An operator's meaning is its reference: codes, scales and amax
are equal bit for bit, products within the bound of another order of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.kernels import cast, scaled_mm
from fp8fx.ops import linear as linear_op
from fp8fx.ops import quantize as quantize_op
from fp8fx.ops.library import LIBRARY, without_autocast
from fp8fx.ops.operands import as_matrix, forward_operand
from fp8fx.ops.scaled_mm import scaled_mm_reference
from fp8fx.spec import SiteSpec, TensorSpec

FORMATS = ("e4m3fn", "e5m2")
SAMPLED = 256  # rows of a gradient that the underflow counts look at: a share of them is enough for a warning


def _rounding(spec: TensorSpec, rng: Tensor | None, site: str, role: str) -> cast.Rounding:
    key = numerics.producer_key(site, role) if spec.stochastic else 0
    return cast.Rounding(spec.rounding, spec.overflow, rng if spec.stochastic else None, key)


def _has_kernel(x: Tensor, spec: TensorSpec) -> bool:
    rounds = spec.rounding in ("nearest_even", "stochastic")
    return spec.granularity == "tensor" and spec.format in FORMATS and rounds and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _cast(
    x: Tensor, spec: TensorSpec, layout: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(q, qT, scale, amax) of a matrix, or of any shape for layout `rows`. One pass where the scale is known, else two."""
    how = _rounding(spec, rng, site, role)
    if scale is None and spec.scaling == "current":
        made = cast.cast_current(x, spec.format, layout=layout, how=how, power_of_two=spec.power_of_two, eps=spec.eps)
        side = (made.scale, made.amax) if made.scale is not None else (made.scale_t, made.amax_t)
        assert side[0] is not None
        assert side[1] is not None
        return made.q, made.q_t, side[0], side[1]
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    used = torch.ones((), dtype=torch.float32, device=x.device) if scale is None else scale.clone()
    q, q_t = cast.cast(x, spec.format, None if scale is None else used, layout=layout, how=how, amax=amax)
    return q, q_t, used, amax


def quantize(
    x: Tensor, spec: str, dims: list[int], rng: Tensor | None = None, site: str = "", role: str = "", scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed):
        return quantize_op.quantize_reference(x, spec, dims, rng, site, role, scale)
    q, _, used, amax = _cast(x, parsed, "rows", rng, site, role, scale)
    assert q is not None
    return q, used, amax


def quantize_both(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed):
        return quantize_op.quantize_both_reference(x, spec, rng, site, role, scale)
    q, q_t, used, amax = _cast(as_matrix(x), parsed, "both", rng, site, role, scale)
    assert q is not None
    assert q_t is not None
    return q.view(x.shape), q_t.mT, used, amax


def quantize_columns(x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor) -> Tensor:
    parsed = TensorSpec.parse(spec)
    if not _has_kernel(x, parsed):
        return quantize_op.quantize_both_reference(x, spec, rng, site, role, scale)[1]
    q_t = _cast(as_matrix(x), parsed, "transposed", rng, site, role, scale)[1]
    assert q_t is not None
    return q_t.mT


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
    plain = scale_a is not None and scale_b is not None and format_a in FORMATS and format_b in FORMATS and not block_a and not block_b
    if not plain or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return scaled_mm_reference(a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, dtype)
    assert scale_a is not None
    assert scale_b is not None
    if accumulate == "precise" and bias is None and _torch_has(a, b):
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)
    return scaled_mm.scaled_mm(a, b, scale_a, scale_b, bias, dtype, accumulate)


def _torch_has(a: Tensor, b: Tensor) -> bool:
    """cuBLAS takes the product as it lies. With precise accumulation it is 1.2 to 1.3 times as fast as our kernel (docs/performance.md)."""
    if a.dim() != 2 or b.dim() != 2 or not a.numel() or not b.numel() or a.dtype == b.dtype == torch.float8_e5m2:
        return False
    aligned = a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
    return aligned and a.is_contiguous() and b.mT.is_contiguous() and a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0


def linear(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    input_spec, weight_spec, backward, dtype = rest[-4:]
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms or not input or not weight:
        return linear_op.linear_reference(x, w, b, input, weight, *rest)
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    if left.scale is not None and left.scale.dim() == 0:
        left = left.flat()
    y = scaled(*left.arguments(), *right.arguments(), b, dtype, spec.accumulate[0])
    return y.view(*x.shape[:-1], y.shape[-1])


def meter_row(x: Tensor, q: Tensor | None, spec: str, *amax: Tensor | None) -> Tensor:
    """The counts come from evenly spaced rows: reading every gradient again would cost half as much as quantizing it."""
    if q is not None and x.dim() > 1 and x.shape[0] > SAMPLED:
        step = x.shape[0] // SAMPLED
        x, q = x[::step], q[::step]
    return quantize_op.meter_row_reference(x, q, spec, *amax)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "quantize_both": quantize_both,
    "quantize_columns": quantize_columns,
    "scaled_mm": scaled,
    "linear": linear,
    "meter_row": meter_row,
}


@functools.cache
def register() -> None:
    """For CUDA tensors these run in place of the references, from the first call of this on."""
    for name, function in IMPLEMENTATIONS.items():
        LIBRARY.impl(name, without_autocast(function), "CUDA")
