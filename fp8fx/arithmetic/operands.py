"""An operand as the tiles read it: K first, so that one step of the sum is one row, and split as the multiplier wants it.

exact      values                                a
mitchell   values +-2^e, detail x float32        a = +-2^e (1 + x)
table      values +-2^e, detail i int64          a = +-2^e (1 + i / 2^m); over codes: values 1, detail the code
hopper     values a, detail 2^e float32          e: the exponent of a, that of the smallest normal number for subnormals
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.arithmetic.multiplier import Multiplier
from fp8fx.arithmetic.numbers import FLOAT32, round_bits
from fp8fx.formats import Format
from fp8fx.numerics.eager import capturing
from fp8fx.numerics.encoding import encode
from fp8fx.numerics.rounding import round_to_format

_EXPONENT = -(1 << 23)  # sign and exponent of float32's bits; & 0x7FFFFFFF leaves the exponent


@dataclass(frozen=True)
class Parts:
    """One operand [K, S], S rows of A or columns of B, split in two."""

    values: Tensor
    detail: Tensor | None = None

    def __getitem__(self, where: tuple[slice, slice]) -> Parts:
        return Parts(self.values[where], None if self.detail is None else self.detail[where])

    @property
    def depth(self) -> int:
        return self.values.shape[0]


def rounded(x: Tensor, name: str) -> Tensor:
    """float32 values of `x`, on the grid of the format called `name`, if any."""
    return round_to_format(x, name) if name else x.float()


def with_mantissa(x: Tensor, bits: int, format: str) -> Tensor:
    """`x` with at most `bits` mantissa bits: nearest, ties to even; a format with no more has them already."""
    if format and formats.get(format).mantissa_bits <= bits:
        return x
    return round_bits(x, Format(f"e8m{bits}", 8, bits, 127, FLOAT32.max, True, "ieee"))


def exact(x: Tensor) -> Parts:
    return Parts(x)


def finite(x: Tensor) -> bool:
    """All of `x` is: one pass over it, which NaN goes through too. False in a CUDA graph, whose replays read other values: the forms for
    what is not finite give the same bits where all is."""
    return not capturing(x.device) and _finite(x)


def _finite(x: Tensor) -> bool:
    return x.numel() == 0 or bool(torch.stack(x.aminmax()).isfinite().all())


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(+-2^e, the 23 mantissa bits as int32) of float32 `x`; what is not finite has its own value in place of the power, and 0."""
    bits = x.view(torch.int32)
    power = (bits & _EXPONENT).view(torch.float32)
    mantissa = bits & 0x7FFFFF
    return (power, mantissa) if finite(x) else (torch.where(x.isfinite(), power, x), torch.where(x.isfinite(), mantissa, 0))


def logarithmic(x: Tensor) -> Parts:
    power, mantissa = split(x)
    return Parts(power, mantissa.float() * 2.0**-23)


def indexed(x: Tensor, multiplier: Multiplier, format: str) -> Parts:
    """`x` holds mantissas of the multiplier's width, or values of `format` for one over codes."""
    if multiplier.mantissa_bits is None:
        codes = encode(x, formats.get(format)).view(torch.uint8).long()
        return Parts(torch.where(x.isfinite(), 1.0, x), codes)
    power, mantissa = split(x)
    return Parts(power, (mantissa >> (23 - multiplier.mantissa_bits)).long())


def with_exponent(x: Tensor, format: str) -> Parts:
    """Hopper aligns by the sum of the operands' exponents; a zero has none, so that it never counts."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    if format:
        power = power.clamp(min=formats.get(format).min_normal)
    return Parts(x, torch.where((x == 0.0) | ~x.isfinite(), 0.0, power))
