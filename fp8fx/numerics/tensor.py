"""One tensor to codes and scale, as a TensorSpec says, and back: `x ~ dequantize_tensor(*quantize_tensor(x, spec)[:2], format)`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.formats import Format
from fp8fx.numerics import statistics
from fp8fx.numerics.eager import plain_cpu
from fp8fx.numerics.encoding import decode, encode
from fp8fx.numerics.rounding import check, round_to_format
from fp8fx.numerics.scaling import amax as compute_amax
from fp8fx.numerics.scaling import compute_e8m0_scale, compute_scale, expand_scale, inverse
from fp8fx.spec import Granularity, TensorSpec

# The eager casts of torch to these two are round-to-nearest-even and exact below max (tests hold it exhaustively). Above max
# they differ between torch versions, so a clamp always comes first.
_CAST = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantize_tensor(
    x: Tensor,
    spec: TensorSpec,
    dims: tuple[int, ...] = (-1,),
    random_bits: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, amax) of `x`, any float dtype and shape: codes = round(float32(x) * (1 / scale)) in `spec.format`.

    codes: the float8 dtype of the format or uint8, x's shape. scale: float32; given, it is used as it is; else 1 with shape () for
    scaling `none`, from spec.max_value for `fixed`, and from the statistic of x for `current`. amax: float32, max |x| over finite
    elements, by spec.granularity. dims: what `row` reduces over (the contraction). random_bits: 32 random bits per element, for
    stochastic rounding. A format without NaN carries it in the scale: that of elements among which one is NaN comes back NaN.
    Raises ModelError for integer x or a missing delayed scale, FormatError for what the format cannot do.
    """
    format = formats.get(spec.format)
    check(x, format, spec.rounding, spec.overflow, random_bits)
    largest = compute_amax(x, spec.granularity, dims)
    unscaled = scale is None and spec.scaling == "none"
    if unscaled:
        scale = torch.ones((), dtype=torch.float32, device=x.device)
    elif scale is None:
        scale = _scale(x, spec, format, dims, largest)
    assert scale is not None
    codes = quantize_scaled(x, format, None if unscaled else scale, spec.granularity, spec.rounding, spec.overflow, random_bits)
    return codes, scale if format.nan != "none" else _with_nan(scale, x, spec.granularity, dims), largest


def _scale(x: Tensor, spec: TensorSpec, format: Format, dims: tuple[int, ...], largest: Tensor) -> Tensor:
    """The scale that `spec` makes itself; of the shape of `largest`, for `fixed` ()."""
    if spec.scaling == "delayed":
        raise ModelError("quantize_tensor: a spec with delayed scaling needs its scale passed in")
    if spec.scaling == "fixed":
        if spec.max_value is None:
            raise ModelError("quantize_tensor: a spec with fixed scaling needs its max_value")
        return _scale_of(torch.full((), spec.max_value, dtype=torch.float32, device=x.device), spec, format)
    value = largest
    if spec.statistic == "mse":
        powers = spec.scale_format == "e8m0" or spec.power_of_two
        fractions = statistics.OCTAVES if powers else statistics.FRACTIONS
        value = statistics.least_error(largest, _error(x, spec, format), spec.granularity, dims, fractions)
    elif spec.statistic != "max":
        groups = statistics.grouped(x, spec.granularity, dims)
        found = statistics.mean(groups) if spec.statistic == "mean" else statistics.percentile(groups, spec.percentile)
        value = found.reshape(largest.shape)
    return _scale_of(value if spec.clip == 1.0 else value * torch.full_like(value, spec.clip), spec, format)


def _scale_of(value: Tensor, spec: TensorSpec, format: Format) -> Tensor:
    """The scale that brings the magnitude `value` to the largest code, in the scale's own format."""
    if spec.scale_format == "e8m0":
        return compute_e8m0_scale(value, format, spec.eps)
    return compute_scale(value, format, spec.power_of_two, spec.eps)


def _error(x: Tensor, spec: TensorSpec, format: Format) -> Callable[[Tensor], Tensor]:
    """From a maximum to what quantizing with it, nearest-even and saturating, does to each finite element; float32, x's shape."""
    single = x.detach().float()
    finite = torch.where(single.abs() < math.inf, single, 0.0)

    def error(value: Tensor) -> Tensor:
        scale = _scale_of(value, spec, format)
        return dequantize_tensor(quantize_scaled(finite, format, scale, spec.granularity), scale, format, spec.granularity) - finite

    return error


def _with_nan(scale: Tensor, x: Tensor, granularity: Granularity, dims: tuple[int, ...]) -> Tensor:
    """`scale`, NaN where an element under it is NaN."""
    nan = x.detach().isnan()
    if plain_cpu(x) and not bool(nan.any()):
        return scale
    return torch.where(compute_amax(nan.float(), "tensor" if scale.dim() == 0 else granularity, dims) > 0.0, math.nan, scale)


def quantize_scaled(
    x: Tensor,
    format: Format,
    scale: Tensor | None,
    granularity: Granularity = "tensor",
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    random_bits: Tensor | None = None,
) -> Tensor:
    """The codes of `x` under `scale` (None: unscaled, x itself is rounded, float64 in float64)."""
    scaled = multiply(x.detach(), scale, granularity)
    nearest = rounding == "nearest_even" and overflow == "saturate"
    if nearest and format.torch_dtype in _CAST and plain_cpu(x) and scaled.dtype != torch.float64:
        # float32 first: clamping a 16-bit NaN loses its sign. In place, unless that would write into x.
        single = scaled.float()
        clamp = torch.clamp if scale is None and x.dtype == torch.float32 else torch.clamp_
        return clamp(single, -format.max, format.max).to(format.torch_dtype)
    return encode(round_to_format(scaled, format, rounding, overflow, random_bits), format)


def multiply(x: Tensor, scale: Tensor | None, granularity: Granularity) -> Tensor:
    """`float32(x) * (1 / scale)`; x itself where scale is None."""
    return x if scale is None else x.float() * expand_scale(inverse(scale), granularity, tuple(x.shape))


def dequantize_tensor(
    codes: Tensor,
    scale: Tensor | None,
    format: str | torch.dtype | Format | None = None,
    granularity: Granularity = "tensor",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`value(codes) * scale` in float32, then cast to `dtype` once; same shape. scale None: the values themselves."""
    values = decode(codes, format)
    if scale is not None:
        values = values * expand_scale(scale, granularity, tuple(codes.shape))
    return values.to(dtype)
