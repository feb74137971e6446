"""The public functions on tensors: `quantize`, `dequantize`, `fake_quantize`, `compute_scale`.

`scale` is always the dequantization multiplier: x ~ quantize(x, format, scale).value * scale. TransformerEngine and IPEX call
`scale` what is 1 / scale here. All work in eager mode and under torch.compile(fullgraph=True), on float16, bfloat16, float32 and
float64 tensors of any shape, empty and non-contiguous ones included; an integer tensor raises ModelError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.formats import Format
from fp8fx.numerics import rounding as rounding_to_format
from fp8fx.numerics import scaling
from fp8fx.numerics import tensor as tensors
from fp8fx.numerics.philox import Word, philox_bits, producer_key
from fp8fx.spec import Granularity

# Both public roundings share one producer: the same seed and step give the same decision in `quantize` and `fake_quantize`.
_KEY = producer_key("fp8fx.functional", "x")
_LEAST, _MOST = 2.0**-149, torch.finfo(torch.float32).max


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
    Raises FormatError for an unknown format, rounding or overflow policy, ModelError for an integer x or a number that is no scale.
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
    factor = _as_scale(scale, x)
    scaled = tensors.multiply(x.detach(), factor, granularity)
    y = rounding_to_format.round_to_format(scaled, format, rounding, overflow, bits)
    if factor is not None:
        y = y * scaling.expand_scale(factor, granularity, tuple(x.shape))
    y = y.to(x.dtype)
    return _straight_through(x, y, scaled.abs() <= format.max) if x.requires_grad and torch.is_grad_enabled() else y


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


def _straight_through(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """`y`, with the gradient of `x` where `kept` and zero elsewhere.

    The difference is +0 exactly, and y - (+0) is y to the bit, -0 included. Not an autograd.Function: compiled by torch 2.11, one
    gave zero gradients in float32.
    """
    passing = torch.where(kept, x, torch.zeros_like(x))
    return y - (passing.detach() - passing)


def _check(x: Tensor, format: Format, rounding_: str, overflow: str, bits: Tensor | None) -> None:
    rounding_to_format.check(x, format, rounding_, overflow, bits)


def _as_scale(scale: Tensor | float | None, x: Tensor) -> Tensor | None:
    if scale is None:
        return None
    if isinstance(scale, Tensor):  # whose values are not looked at: on a GPU that would wait for them
        return scale.detach().float()
    if not hasattr(scale, "__float__") or not _LEAST <= scale <= _MOST:
        # The value is not named: Dynamo has a symbol there.
        raise ModelError(
            "a scale is a finite number above 0 that float32 holds: it multiplies codes to give values, as compute_scale makes it"
        )
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def _random_bits(x: Tensor, rounding_: str, seed: Word | None, step: Word) -> Tensor | None:
    if rounding_ != "stochastic":
        return None
    if seed is None:
        seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
    return philox_bits(x.shape, seed, _KEY, step, 0, x.device)


__all__ = ["compute_scale", "dequantize", "fake_quantize", "quantize"]
