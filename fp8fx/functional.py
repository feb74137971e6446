"""The public functions on tensors: `quantize`, `dequantize`, `fake_quantize`, `compute_scale`.

`scale` is always the dequantization multiplier: x ~ quantize(x, format, scale).value * scale. TransformerEngine and IPEX call
`scale` what is 1 / scale here. All work in eager mode and under torch.compile(fullgraph=True), on float16, bfloat16, float32 and
float64 tensors of any shape, empty and non-contiguous ones included; an integer tensor raises ModelError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.formats import Format
from fp8fx.numerics import rounding as rounding_to_format
from fp8fx.numerics import scaling
from fp8fx.numerics import tensor as tensors
from fp8fx.numerics.philox import Word, philox_bits, producer_key
from fp8fx.spec import Granularity

# Both public roundings share one producer: the same seed and step give the same decision in `quantize` and `fake_quantize`.
_KEY = producer_key("fp8fx.functional", "x")


def quantize(
    x: Tensor,
    format: str | torch.dtype | Format,
    scale: Tensor | float | None = None,
    *,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    granularity: Granularity = "tensor",
    seed: Word | None = None,
    step: Word = 0,
) -> Tensor:
    """The codes of `round(float32(x) * (1 / scale))`: the float8 dtype of the format, else uint8; x's shape.

    scale: float32, () or any shape that broadcasts against x; one per block [..., ceil(M/r), ceil(K/c)] for granularity (r, c);
    None: 1. seed, step: for `stochastic`; without a seed one is drawn from torch's default generator.
    Raises FormatError for an unknown format, rounding or overflow policy, ModelError for an integer x.
    """
    format = formats.get(format)
    bits = _random_bits(x, rounding, seed, step)
    _check(x, format, rounding, overflow, bits)
    return tensors.quantize_scaled(x, format, _as_scale(scale, x), granularity, rounding, overflow, bits)


def dequantize(
    q: Tensor,
    scale: Tensor | float | None,
    format: str | torch.dtype | Format | None = None,
    *,
    granularity: Granularity = "tensor",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`value(q) * scale` in float32, cast to `dtype` once; q's shape. uint8 codes need `format` (FormatError otherwise)."""
    return tensors.dequantize_tensor(q, _as_scale(scale, q), format, granularity, dtype)


def fake_quantize(
    x: Tensor,
    format: str | torch.dtype | Format,
    scale: Tensor | float | None = None,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    *,
    granularity: Granularity = "tensor",
    seed: Word | None = None,
    step: Word = 0,
) -> Tensor:
    """`dequantize(quantize(x, format, scale), scale)` in x's dtype, differentiable in x.

    The gradient is passed straight through where |x / scale| <= max of the format and is zero where x saturated (or is NaN). In
    float16 a value above 65504 becomes inf, as in any cast to it. Arguments and errors as in `quantize`.
    """
    format = formats.get(format)
    bits = _random_bits(x, rounding, seed, step)
    _check(x, format, rounding, overflow, bits)
    out: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, _as_scale(scale, x), bits, format, rounding, overflow, granularity
    )
    return out


def compute_scale(
    x: Tensor,
    format: str | torch.dtype | Format,
    granularity: Granularity = "tensor",
    *,
    dims: tuple[int, ...] = (-1,),
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The scale that brings max |x| onto the largest value of `format`: max(amax, eps) / fmax, float32.

    Shape () for `tensor`, x's with size 1 at `dims` for `row`, [..., ceil(M/r), ceil(K/c)] for a block (r, c). NaN and inf do not count.
    """
    format = formats.get(format)
    _check(x, format, "nearest_even", "saturate", None)
    return scaling.compute_scale(scaling.amax(x, granularity, dims), format, power_of_two, eps)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        bits: Tensor | None,
        format: Format,
        rounding_: str,
        overflow: str,
        granularity: Granularity,
    ) -> Tensor:
        scaled = tensors.multiply(x, scale, granularity)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(scaled.abs() <= format.max)
        y = rounding_to_format.round_to_format(scaled, format, rounding_, overflow, bits)
        if scale is not None:
            y = y * scaling.expand_scale(scale, granularity, tuple(x.shape))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, grads[0], torch.zeros_like(grads[0])), None, None, None, None, None, None


def _check(x: Tensor, format: Format, rounding_: str, overflow: str, bits: Tensor | None) -> None:
    rounding_to_format.check(x, format, rounding_, overflow, bits)


def _as_scale(scale: Tensor | float | None, x: Tensor) -> Tensor | None:
    if scale is None:
        return None
    return scale.float() if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=x.device)


def _random_bits(x: Tensor, rounding_: str, seed: Word | None, step: Word) -> Tensor | None:
    if rounding_ != "stochastic":
        return None
    if seed is None:
        seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
    return philox_bits(x.shape, seed, _KEY, step, 0, x.device)


__all__ = ["compute_scale", "dequantize", "fake_quantize", "quantize"]
