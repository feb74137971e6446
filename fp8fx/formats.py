"""The number formats: a literal table, and the rule for any other `eXmY` of up to 8 bits.

A format has 1 sign bit, X exponent bits and Y mantissa bits. With exponent field e and mantissa field m a code is worth

    (-1)^s * 2^(e - bias) * (1 + m / 2^Y)      e > 0  (normal)
    (-1)^s * 2^(1 - bias) * (m / 2^Y)          e = 0  (subnormal)

except for the codes that the NaN style takes away:

    ieee   bias 2^(X-1) - 1; the top exponent holds inf (m = 0) and NaN (m > 0)
    fn     bias 2^(X-1) - 1; no inf; NaN is the code with all ones, of either sign
    fnuz   bias 2^(X-1);     no inf; NaN is the code of -0, so zero has no sign
    none   bias 2^(X-1) - 1; every code is a number

A name outside the table reads `eXmY` + suffix; without a suffix it is `ieee`. The OCP MX element formats e2m1, e2m3 and e3m2
keep their standard meaning, `none`. Bare `e4m3` and `e3m4` are refused, because peers mean different formats by them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from fp8fx.errors import FormatError, allowed, nearest


@dataclass(frozen=True)
class Format:
    """One number format. `max` is the largest finite value; `torch_dtype` is None where torch has no such dtype."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    has_inf: bool
    nan: str
    signed_zero: bool = True
    torch_dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits per code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value; subnormals share it."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        return math.ldexp(1.0, self.emin)

    @property
    def min_subnormal(self) -> float:
        return math.ldexp(1.0, self.emin - self.mantissa_bits)

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that `encode` gives: the torch float8 dtype, else uint8 (the code in the low bits)."""
        return torch.uint8 if self.torch_dtype is None else self.torch_dtype

    @property
    def nan_code(self) -> int | None:
        """The code of positive NaN: all ones below the sign, as torch casts; that of -0 for `fnuz`; None where there is no NaN."""
        top = 1 << (self.bits - 1)
        return {"ieee": top - 1, "fn": top - 1, "fnuz": top, "none": None}[self.nan]

    @property
    def inf_code(self) -> int | None:
        """The code of +inf, or None."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.has_inf else None

    def value(self, code: int) -> float:
        """The exact value of one code in [0, 2^bits)."""
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        special = self._special(code, magnitude, exponent, mantissa)
        if special is not None:
            return math.copysign(special, sign)
        significand = mantissa + ((1 << self.mantissa_bits) if exponent else 0)
        return sign * math.ldexp(significand, max(exponent, 1) - self.bias - self.mantissa_bits)

    def _special(self, code: int, magnitude: int, exponent: int, mantissa: int) -> float | None:
        if self.nan == "ieee" and exponent == (1 << self.exponent_bits) - 1:
            return math.nan if mantissa else math.inf
        if self.nan == "fn" and magnitude == (1 << (self.bits - 1)) - 1:
            return math.nan
        return math.nan if self.nan == "fnuz" and code == 1 << (self.bits - 1) else None

    def codes(self) -> list[float]:
        """The value of every code, in code order: a list of 2^bits floats with NaN and inf where the format has them."""
        return [self.value(code) for code in range(1 << self.bits)]

    def finite_values(self) -> list[float]:
        """The distinct finite values in ascending order (zero once)."""
        return sorted({value for value in self.codes() if math.isfinite(value)})

    def __str__(self) -> str:
        return self.name


TABLE: dict[str, Format] = {
    format_.name: format_
    for format_ in (
        # name, exponent bits, mantissa bits, bias, max, inf, NaN style, signed zero, torch dtype
        Format("e4m3fn", 4, 3, 7, 448.0, False, "fn", True, torch.float8_e4m3fn),
        Format("e5m2", 5, 2, 15, 57344.0, True, "ieee", True, torch.float8_e5m2),
        Format("e4m3ieee", 4, 3, 7, 240.0, True, "ieee"),
        Format("e3m4ieee", 3, 4, 3, 15.5, True, "ieee"),
        Format("e3m4fn", 3, 4, 3, 30.0, False, "fn"),
        Format("e2m5", 2, 5, 1, 3.9375, True, "ieee"),
        Format("e4m3fnuz", 4, 3, 8, 240.0, False, "fnuz", False, torch.float8_e4m3fnuz),
        Format("e5m2fnuz", 5, 2, 16, 57344.0, False, "fnuz", False, torch.float8_e5m2fnuz),
        Format("e3m2", 3, 2, 3, 28.0, False, "none"),  # OCP MXFP6
        Format("e2m3", 2, 3, 1, 7.5, False, "none"),  # OCP MXFP6
        Format("e2m1", 2, 1, 1, 6.0, False, "none"),  # OCP MXFP4
    )
}

_AMBIGUOUS = {"e4m3": "e4m3fn (448) or e4m3ieee (240)", "e3m4": "e3m4fn (30) or e3m4ieee (15.5)"}
_PATTERN = re.compile(r"e([0-9])m([0-9])(ieee|fn|fnuz)?")

# A plain dict, not functools.lru_cache: Dynamo reads a dict, while it traces *through* a cached function and warns.
_KNOWN: dict[str | torch.dtype, Format] = {
    **dict(TABLE.items()),
    **{format_.torch_dtype: format_ for format_ in TABLE.values() if format_.torch_dtype is not None},
}


def get(format: str | torch.dtype | Format) -> Format:
    """The format called `format`: a name, a torch float8 dtype, or a Format (returned as it is).

    Raises FormatError for an unknown or ambiguous name, listing what may be written.
    """
    if isinstance(format, Format):
        return format
    found = _KNOWN.get(format)
    if found is None:
        found = _KNOWN[format] = _parse(format)
    return found


def _parse(name: str | torch.dtype) -> Format:
    if isinstance(name, str) and name in _AMBIGUOUS:
        raise FormatError(f"format {name!r} is ambiguous: write {_AMBIGUOUS[name]}")
    match = _PATTERN.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise FormatError(f"unknown format {name!r}; allowed: {allowed(TABLE)}, or any eXmY of 2 to 8 bits.{nearest(name, TABLE)}")
    exponent_bits, mantissa_bits, style = int(match[1]), int(match[2]), match[3] or "ieee"
    canonical = f"e{exponent_bits}m{mantissa_bits}"
    if canonical in TABLE and TABLE[canonical].nan == style:
        return TABLE[canonical]  # "e5m2ieee" is "e5m2"
    return _build(match[0], exponent_bits, mantissa_bits, style)


def _build(name: str, exponent_bits: int, mantissa_bits: int, style: str) -> Format:
    """The format of a name outside the table; its `max` comes from the list of its codes."""
    if not exponent_bits >= 1 or not exponent_bits + mantissa_bits + 1 <= 8:
        raise FormatError(f"format {name!r} must have at least 1 exponent bit, and at most 8 bits with its sign")
    if style == "ieee" and mantissa_bits == 0:
        raise FormatError(f"format {name!r} has no mantissa bit to tell NaN from inf; write {name.removesuffix('ieee')}fn or fnuz")
    bias = 2 ** (exponent_bits - 1) - (style != "fnuz")
    draft = Format(name, exponent_bits, mantissa_bits, bias, 0.0, style == "ieee", style, style != "fnuz")
    largest = draft.finite_values()[-1]
    if largest == 0.0:
        raise FormatError(f"format {name!r} can hold no number but zero; give it one more bit")
    return Format(name, exponent_bits, mantissa_bits, bias, largest, style == "ieee", style, style != "fnuz")
