"""One tensor to codes and scale, as a TensorSpec says, and back: `x ~ dequantize_tensor(*quantize_tensor(x, spec)[:2], format)`."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.formats import Format
from fp8fx.numerics.eager import plain_cpu
from fp8fx.numerics.encoding import decode, encode
from fp8fx.numerics.rounding import check, round_to_format
from fp8fx.numerics.scaling import amax as compute_amax
from fp8fx.numerics.scaling import compute_scale, expand_scale, inverse
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
    scaling `none`, and from amax for `current`. amax: float32, max |x| over finite elements, by spec.granularity. dims: what `row`
    reduces over (the contraction). random_bits: 32 random bits per element, for stochastic rounding.
    Raises ModelError for integer x or a missing delayed scale, FormatError for what the format cannot do.
    """
    format = formats.get(spec.format)
    check(x, format, spec.rounding, spec.overflow, random_bits)
    largest = compute_amax(x, spec.granularity, dims)
    unscaled = scale is None and spec.scaling == "none"
    if unscaled:
        scale = torch.ones((), dtype=torch.float32, device=x.device)
    elif scale is None:
        if spec.scaling == "delayed":
            raise ModelError("quantize_tensor: a spec with delayed scaling needs its scale passed in")
        scale = compute_scale(largest, format, spec.power_of_two, spec.eps)
    assert scale is not None
    codes = quantize_scaled(x, format, None if unscaled else scale, spec.granularity, spec.rounding, spec.overflow, random_bits)
    return codes, scale, largest


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
