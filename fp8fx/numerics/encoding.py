"""Codes and values: `encode` packs grid values into codes, `decode` reads them back. Both exact; `decode(encode(v)) == v`.

Codes are the torch float8 dtype where there is one. Other formats use uint8, the code in the low bits. The two-sided formula:

    normal      code = bits(|v|) >> (23 - M)  -  (emin - 1 + 127) << M        with M mantissa bits
    subnormal   code = |v| * 2^(M - emin)

Integers are their own two's complement. With a fractional bias the values are those of a grid with a whole bias, times a constant.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fp8fx import formats
from fp8fx.errors import FormatError
from fp8fx.formats import Format
from fp8fx.numerics.eager import in_chunks, plain_cpu


def encode(values: Tensor, format: str | torch.dtype | Format) -> Tensor:
    """Codes of float32 `values` that lie on the grid of `format` (what `round_to_format` gives); same shape.

    The float8 dtype of the format, else uint8. NaN keeps its sign as the cast of torch does; in a format without NaN it becomes
    the code of -0 (as ml_dtypes does), or of 0: such formats carry NaN in the scale.
    """
    format = formats.get(format)
    if format.torch_dtype is not None:
        return values.to(format.torch_dtype)
    values = values.detach().float()
    if format.base is not None:
        return encode(_on_grid(values, format), format.base)
    if plain_cpu(values):
        return in_chunks(lambda piece: _encode_by_table(piece, format), torch.uint8, values)
    return _encode_bits(values, format)


def _on_grid(values: Tensor, format: Format) -> Tensor:
    """The grid values that `values`, each rounded to float32 after the multiplication by the factor, come from."""
    near = (values.double() / torch.full((), format.factor, dtype=torch.float64, device=values.device)).float()
    # Within 2^-23 of a value of at most 8 significant bits: adding half of what lies below them makes it that value.
    exact = ((near.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    return torch.where(near.abs() < math.inf, exact, near)


def _encode_by_table(values: Tensor, format: Format) -> Tensor:
    """By the upper half of the float32 bits: grid values have at most 7 significant bits, so the lower half is zero but in a NaN."""
    upper = (values.view(torch.int32) >> 16) & 0xFFFF
    return _code_table(format).index_select(0, upper)


@functools.cache
def _code_table(format: Format) -> Tensor:
    """The code of every float32 whose lower 16 bits are zero, by the upper 16; of use for grid values only."""
    with _disable_current_modes(), torch.inference_mode(False):
        return _encode_bits((torch.arange(65536, dtype=torch.int32, device="cpu") << 16).view(torch.float32), format)


def _encode_bits(values: Tensor, format: Format) -> Tensor:
    bits = values.view(torch.int32)
    if format.integer:
        whole = torch.where(values.abs() <= format.max, values, 0.0).to(torch.int32)  # NaN is 0
        return (whole & (2 * format.magnitudes - 1)).to(torch.uint8)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - format.mantissa_bits)) - ((format.emin + 126) << format.mantissa_bits)
    subnormal = (values.abs() * (1.0 / format.min_subnormal)).to(torch.int32)
    code = torch.where(magnitude < ((format.emin + 127) << 23), subnormal, normal)
    if format.inf_code is not None:
        code = torch.where(magnitude == 0x7F800000, format.inf_code, code)
    sign = (bits >> 31) & (format.magnitudes if format.signed else 0)
    if not format.signed_zero:
        sign = torch.where(magnitude == 0, 0, sign)
    quiet = format.nan_code
    nan = magnitude > 0x7F800000
    if quiet is None or format.nan == "fnuz":
        return torch.where(nan, format.magnitudes if format.signed else 0, code | sign).to(torch.uint8)
    return torch.where(nan, quiet | sign, code | sign).to(torch.uint8)


def decode(codes: Tensor, format: str | torch.dtype | Format | None = None) -> Tensor:
    """The float32 value of every code; same shape. uint8 codes need `format`, a float8 dtype says it itself.

    Raises FormatError where `format` is missing or is not that of the codes.
    """
    format = codes_format(codes, format)
    codes = codes if format.torch_dtype is None else codes.view(format.torch_dtype)
    if format.torch_dtype is torch.float8_e5m2:
        return codes.float()  # the cast is the fastest form already
    if plain_cpu(codes):
        return _table(format).index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)
    return codes.float() if format.torch_dtype is not None else _decode_bits(codes, format)


def codes_format(codes: Tensor, format: str | torch.dtype | Format | None) -> Format:
    """The format of `codes`, checked against `format` where that is given."""
    if format is None:
        if codes.dtype == torch.uint8 or not codes.dtype.is_floating_point or codes.dtype.itemsize != 1:
            raise FormatError(f"{codes.dtype} codes do not say their format: pass format=, the one they were quantized with")
        return formats.get(codes.dtype)
    format = formats.get(format)
    if codes.dtype not in (format.code_dtype, torch.uint8):
        raise FormatError(f"codes are {codes.dtype}, but format {format.name} has {format.code_dtype}")
    return format


@functools.cache
def _table(format: Format) -> Tensor:
    """The 256 values by code, on the CPU; codes above 2^bits repeat."""
    values = format.codes()
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.tensor([values[code % len(values)] for code in range(256)], dtype=torch.float32, device="cpu")


def _decode_bits(codes: Tensor, format: Format) -> Tensor:
    if format.base is not None:
        return (_decode_bits(codes, format.base).double() * format.factor).float()
    m, code = format.mantissa_bits, codes.to(torch.int32) & ((1 << format.bits) - 1)
    if format.integer:
        return torch.where(code >= format.magnitudes, code - 2 * format.magnitudes, code).float()
    magnitude = code & (format.magnitudes - 1)
    normal = ((magnitude << (23 - m)) + ((127 - int(format.bias)) << 23)).view(torch.float32)
    value = torch.where(magnitude >> m > 0, normal, magnitude.float() * format.min_subnormal)
    if format.inf_code is not None:
        value = value.masked_fill(magnitude == format.inf_code, math.inf).masked_fill(magnitude > format.inf_code, math.nan)
    elif format.nan == "fn":
        value = value.masked_fill(magnitude == format.magnitudes - 1, math.nan)
    sign = code >= format.magnitudes
    if format.nan == "fnuz":
        return torch.where(sign & (magnitude == 0), math.nan, torch.where(sign, -value, value))
    return torch.where(sign, -value, value)
