"""The number formats: a literal table, and rules for any other `eXmY` or `intN` of 2 to 8 bits.

`eXmY` has 1 sign bit, X exponent bits and Y mantissa bits. With exponent field e and mantissa field m a code is worth

    (-1)^s * 2^(e - bias) * (1 + m / 2^Y)      e > 0  (normal)
    (-1)^s * 2^(1 - bias) * (m / 2^Y)          e = 0  (subnormal)

except for the codes that the NaN style takes away:

    ieee   bias 2^(X-1) - 1; the top exponent holds inf (m = 0) and NaN (m > 0)
    fn     bias 2^(X-1) - 1; no inf; NaN is the code with all ones, of either sign
    fnuz   bias 2^(X-1);     no inf; NaN is the code of -0, so zero has no sign
    none   bias 2^(X-1) - 1; every code is a number

A name reads `eXmY`, then perhaps `b<bias>`, then perhaps the style: `e4m3b11fnuz`, `e4m3b6.5`. Without a style it is that of the table's
`eXmY`, else `ieee`; so the OCP MX element formats e2m1, e2m3 and e3m2 keep their meaning, `none`. Bare `e4m3` and `e3m4` are refused,
because peers mean different formats by them. A bias with a fraction f makes the grid of the next lower whole bias times 2^-f, each value
rounded to float32 once.

`u` in front leaves the sign bit away (`ue4m4`). Such a format has no negative value: they become 0 under `saturate`, NaN under `nonfinite`.
`intN` holds the integers from -(2^(N-1) - 1) to 2^(N-1) - 1, as two's complement; it has neither inf, NaN nor -0.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace

import torch

from fp8fx.errors import FormatError, allowed, nearest


@dataclass(frozen=True)
class Format:
    """One number format. `max` is the largest finite value; `torch_dtype` is None where torch has no such dtype.

    base: of a format with a fractional bias, that with the next lower whole bias; a value is the base's times `factor`.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: float  # an int but for fractional ones
    max: float
    has_inf: bool
    nan: str
    signed_zero: bool = True
    torch_dtype: torch.dtype | None = None
    signed: bool = True
    integer: bool = False  # codes are two's complement
    base: Format | None = None

    @property
    def bits(self) -> int:
        """Bits per code, sign included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def grid(self) -> Format:
        """The format with a whole bias whose values times `factor` are this one's; itself in most cases."""
        return self if self.base is None else self.base

    @property
    def factor(self) -> float:
        """In (1/2, 1]: 1 but for a fractional bias."""
        return 1.0 if self.base is None else 2.0 ** (self.base.bias - self.bias)

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value of `grid`; subnormals share it."""
        return 1 - int(self.grid.bias)

    @property
    def min_normal(self) -> float:
        return _single(math.ldexp(self.factor, self.emin))

    @property
    def min_subnormal(self) -> float:
        return _single(math.ldexp(self.factor, self.emin - self.mantissa_bits))

    @property
    def beyond(self) -> float:
        """The grid value after `max`, were there one more: what overflows in nearest-even rounds to at least this."""
        exponent = max(math.frexp(self.grid.max)[1] - 1, self.emin)
        return (self.grid.max + math.ldexp(1.0, exponent - self.mantissa_bits)) * self.factor

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that `encode` gives: the torch float8 dtype, else uint8 (the code in the low bits)."""
        return torch.uint8 if self.torch_dtype is None else self.torch_dtype

    @property
    def magnitudes(self) -> int:
        """How many codes there are without the sign."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def nan_code(self) -> int | None:
        """The code of positive NaN: all ones below the sign, as torch casts; that of -0 for `fnuz`; None where there is no NaN."""
        return {"ieee": self.magnitudes - 1, "fn": self.magnitudes - 1, "fnuz": self.magnitudes, "none": None}[self.nan]

    @property
    def inf_code(self) -> int | None:
        """The code of +inf, or None."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.has_inf else None

    def value(self, code: int) -> float:
        """The exact value of one code in [0, 2^bits)."""
        if self.base is not None:
            return _single(self.base.value(code) * self.factor)
        if self.integer:
            return float(code - 2 * self.magnitudes if code >= self.magnitudes else code)
        sign = -1.0 if code >= self.magnitudes else 1.0
        magnitude = code % self.magnitudes
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        special = self._special(code, magnitude, exponent, mantissa)
        if special is not None:
            return math.copysign(special, sign)
        significand = mantissa + ((1 << self.mantissa_bits) if exponent else 0)
        return sign * math.ldexp(significand, max(exponent, 1) - int(self.bias) - self.mantissa_bits)

    def _special(self, code: int, magnitude: int, exponent: int, mantissa: int) -> float | None:
        if self.nan == "ieee" and exponent == (1 << self.exponent_bits) - 1:
            return math.nan if mantissa else math.inf
        if self.nan == "fn" and magnitude == self.magnitudes - 1:
            return math.nan
        return math.nan if self.nan == "fnuz" and code == self.magnitudes else None

    def codes(self) -> list[float]:
        """The value of every code, in code order: a list of 2^bits floats with NaN and inf where the format has them."""
        return [self.value(code) for code in range(1 << self.bits)]

    def finite_values(self) -> list[float]:
        """The distinct finite values in ascending order (zero once), without the lowest two's complement, which is never made."""
        lowest = -self.max if self.integer else -math.inf
        return sorted({value for value in self.codes() if math.isfinite(value) and value >= lowest})

    def __str__(self) -> str:
        return self.name


def _single(value: float) -> float:
    """`value` rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


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

# Names of whole roles in recipes: the OCP MX formats, by the format of their elements.
MX = {"mxfp8_e4m3": "e4m3fn", "mxfp8_e5m2": "e5m2", "mxfp6_e3m2": "e3m2", "mxfp6_e2m3": "e2m3", "mxfp4": "e2m1"}

AMBIGUOUS = {"e4m3": "e4m3fn (448) or e4m3ieee (240)", "e3m4": "e3m4fn (30) or e3m4ieee (15.5)"}
_PATTERN = re.compile(r"(u?)e([0-9])m([0-9])(?:b(-?[0-9]+(?:\.[0-9]+)?))?(ieee|fnuz|fn|none)?")
_INTEGER = re.compile(r"int([0-9]+)")
_SMALLEST, _LARGEST = 2.0**-126, 2.0**125  # of a format's values: float32 holds them, and what lies between and beyond, as normal numbers

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
        found = _parse(format)
        found = _KNOWN[format] = _KNOWN.setdefault(found.name, found)
    return found


def _other_spelling(name: object) -> str:
    """A " Did you mean ...?" for capital letters, torch's and other libraries' words: E4M3FN, torch.float8_e5m2, fp8_e4m3, fp8."""
    word = re.sub(r"^(torch\.)?(float|fp)8_?", "", str(name).lower())
    if word in ("", *AMBIGUOUS) and word != str(name):
        return " Did you mean 'e4m3fn' or 'e5m2'?" if not word else f" Did you mean {AMBIGUOUS[word]}?"
    written = word != str(name) and (word in MX or _INTEGER.fullmatch(word) or _PATTERN.fullmatch(word))
    return f" Did you mean {word!r}?" if written else ""


def _parse(name: str | torch.dtype) -> Format:
    if isinstance(name, str) and name in AMBIGUOUS:
        raise FormatError(f"format {name!r} is ambiguous: write {AMBIGUOUS[name]}")
    if isinstance(name, str) and name in MX:
        element = f"its elements are {MX[name]}, with an e8m0 scale per group of 32"
        raise FormatError(f"{name!r} names a whole role of a recipe, not the format of a number: {element}")
    if isinstance(name, str) and (integer := _INTEGER.fullmatch(name)):
        return _integer(name, int(integer[1]))
    match = _PATTERN.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        known = [*TABLE, "int8", "int4", *MX]
        rule = "any eXmY or ueXmY with an optional bias (e4m3b6.5) and style (ieee, fn, fnuz, none), or intN, of 2 to 8 bits"
        raise FormatError(f"unknown format {name!r}; allowed: {allowed(TABLE)}, {rule}.{_other_spelling(name) or nearest(name, known)}")
    signed, exponent_bits, mantissa_bits, layout = not match[1], int(match[2]), int(match[3]), f"e{match[2]}m{match[3]}"
    default = TABLE[layout].nan if layout in TABLE else "ieee"
    style = match[5] or default
    usual = 2 ** (max(exponent_bits, 1) - 1) - (style != "fnuz")
    bias = usual if match[4] is None else float(match[4])
    number = "" if bias == usual else f"b{_number(bias)}"
    ambiguous = signed and not number and layout in AMBIGUOUS
    canonical = f"{match[1]}{layout}{number}{style if style != default or ambiguous else ''}"
    if canonical in TABLE:
        return TABLE[canonical]  # "e5m2ieee" is "e5m2"
    return _build(canonical, exponent_bits, mantissa_bits, bias, style, signed)


def _number(bias: float) -> str:
    """`6.5`, and `7` for a whole number; never with an exponent."""
    return str(int(bias)) if bias == int(bias) else repr(bias)


def _integer(name: str, bits: int) -> Format:
    """Integers lie on the grid of 1 exponent bit whose step is 1: m for e = 0, 2^Y + m for e = 1."""
    if not 2 <= bits <= 8:
        raise FormatError(f"format {name!r} must have 2 to 8 bits with its sign, as int8 and int4 have")
    return Format(f"int{bits}", 1, bits - 2, 3 - bits, 2.0 ** (bits - 1) - 1, False, "none", False, None, True, True)


def _build(name: str, exponent_bits: int, mantissa_bits: int, bias: float, style: str, signed: bool) -> Format:
    """The format of a name outside the table; its `max` comes from the list of its codes."""
    if not exponent_bits >= 1 or not 2 <= exponent_bits + mantissa_bits + signed <= 8:
        raise FormatError(
            f"format {name!r} must have at least 1 exponent bit, and at least 2 and at most 8 bits{' with its sign' if signed else ''}"
        )
    if style == "ieee" and mantissa_bits == 0:
        raise FormatError(f"format {name!r} has no mantissa bit to tell NaN from inf; write {name.removesuffix('ieee')}fn or fnuz")
    if style == "fnuz" and not signed:
        raise FormatError(f"format {name!r} has no code of -0 to hold NaN; write {name.removesuffix('fnuz')}fn")
    whole = math.floor(bias)
    if not abs(whole) <= 200:
        raise FormatError(f"format {name!r} has values outside of [2^-126, 2^125], which float32 cannot hold; choose another bias")
    draft = Format(name, exponent_bits, mantissa_bits, whole, 0.0, style == "ieee", style, signed and style != "fnuz", None, signed)
    largest = draft.finite_values()[-1]
    if largest == 0.0:
        raise FormatError(f"format {name!r} can hold no number but zero; give it one more bit")
    if math.ldexp(1.0, draft.emin - mantissa_bits) < _SMALLEST or largest > _LARGEST:
        raise FormatError(f"format {name!r} has values outside of [2^-126, 2^125], which float32 cannot hold; choose another bias")
    built = replace(draft, max=largest)
    if bias == whole:
        return built
    fractional = replace(built, bias=bias, base=built)
    return replace(fractional, max=_single(largest * fractional.factor))
