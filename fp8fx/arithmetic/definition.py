"""The definition of every arithmetic, written to be read: exact fractions, one element at a time. Slow.

A step that torch does in float32 (a product, an addition) is exact here and then rounded to float32, as IEEE asks of the processor. The
tests hold the tiles to this bit for bit, and float products within the bound of another order of sums. Nothing else uses this module.
"""

from __future__ import annotations

import math
from fractions import Fraction

from fp8fx import formats
from fp8fx.arithmetic.numbers import FLOAT32, number
from fp8fx.arithmetic.spec import HOPPER, Arithmetic
from fp8fx.formats import Format

Number = Fraction | float  # a float only for inf and NaN


def exponent_of(x: Fraction) -> int:
    """floor(log2 |x|) of x != 0."""
    x = abs(x)
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def round_number(x: Number, format: Format, rounding: str = "nearest_even", overflow: str = "nonfinite", word: int = 0) -> Number:
    """`x` in `format`. word: the 32 random bits, for `stochastic`."""
    if isinstance(x, float):  # inf or NaN
        if math.isnan(x) or overflow == "nonfinite":
            return x if format.has_inf else math.nan
        return Fraction(math.copysign(format.max, x))
    if x == 0:
        return x
    step = Fraction(2) ** (max(exponent_of(x), format.emin) - format.mantissa_bits)
    k, rest = divmod(abs(x) / step, 1)
    away = {
        "nearest_even": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and k % 2 == 1),
        "nearest_away": rest >= Fraction(1, 2),
        "toward_zero": False,
        "up": rest > 0 and x > 0,
        "down": rest > 0 and x < 0,
        "stochastic": math.floor(rest * 2**32) + word >= 2**32,
    }[rounding]
    magnitude = (k + away) * step
    if magnitude > Fraction(format.max):
        kept = rounding == "toward_zero" or (rounding == "up" and x < 0) or (rounding == "down" and x > 0)
        if overflow == "saturate" or kept:
            magnitude = Fraction(format.max)
        else:
            return math.copysign(math.inf if format.has_inf else math.nan, x)
    return magnitude if x > 0 else -magnitude


def single(x: Number) -> Number:
    """IEEE float32 of an exact result."""
    return round_number(x, FLOAT32)


def multiply(a: float, b: float, arithmetic: Arithmetic, format: str = "") -> Number:
    """One product before it is rounded to `products`."""
    table = arithmetic.table(None)
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    if table is not None and table.mantissa_bits is None:
        codes = [formats.get(format).codes().index(value) for value in (a, b)]
        return Fraction(table.table[codes[0], codes[1]].item())
    if a == 0 or b == 0:
        return Fraction(0)
    if arithmetic.multiplier == "exact":
        return single(Fraction(a) * Fraction(b))
    if arithmetic.multiplier == "mitchell":
        (ea, x), (eb, y) = _significand(Fraction(a)), _significand(Fraction(b))
        significand = 1 + x + y if x + y < 1 else 2 * (x + y)
    else:
        assert table is not None
        assert table.mantissa_bits is not None
        narrow = Format("", 8, table.mantissa_bits, 127, FLOAT32.max, True, "ieee")
        (ea, x), (eb, y) = (_significand(Fraction(round_number(Fraction(value), narrow))) for value in (a, b))
        size = 2**table.mantissa_bits
        significand = Fraction(table.table[int(x * size), int(y * size)].item())
    return single((1 if (a > 0) == (b > 0) else -1) * Fraction(2) ** (ea + eb) * significand)


def _significand(x: Fraction) -> tuple[int, Fraction]:
    """(e, f) of |x| = 2^e (1 + f)."""
    e = exponent_of(x)
    return e, abs(x) / Fraction(2) ** e - 1


def add(x: Number, y: Number) -> Number:
    """One float32 addition."""
    if isinstance(x, float) or isinstance(y, float):
        return float(x) + float(y)
    return single(x + y)


def instruction(acc: Fraction, pairs: list[tuple[float, float]], least: int = -100, fraction: int = 13, format: str = "") -> Fraction:
    """One instruction of `hopper_fast` (tiles.py)."""
    emin = formats.get(format).emin if format else -126
    exponents = [sum(max(exponent_of(Fraction(v)), emin) for v in pair) for pair in pairs if 0.0 not in pair]
    largest = max([least, *exponents, *([exponent_of(acc)] if acc else [])])
    step = Fraction(2) ** (largest - fraction)
    total = sum((Fraction(math.trunc(Fraction(a) * Fraction(b) / step)) for a, b in pairs), Fraction(math.trunc(acc / step)))
    return _as_fraction(round_number(total * step, number("e8m13"), "toward_zero"))


def _as_fraction(x: Number) -> Fraction:
    assert isinstance(x, Fraction)
    return x


def _sum(a: list[float], b: list[float], arithmetic: Arithmetic, format: str) -> Number:
    """One chunk."""
    if arithmetic.accumulate == HOPPER:
        acc = Fraction(0)
        for start in range(0, len(a), 32):
            acc = instruction(acc, list(zip(a, b, strict=True))[start : start + 32], format=format)
        return acc
    total: Number = Fraction(0)
    products, sums = number(arithmetic.products), number(arithmetic.accumulate)
    for x, y in zip(a, b, strict=True):
        p = round_number(_shifted(multiply(x, y, arithmetic, format), arithmetic.shift), products, arithmetic.rounding, arithmetic.overflow)
        total = round_number(add(total, p), sums, arithmetic.rounding, arithmetic.overflow)
    return total


def dot(a: list[float], b: list[float], arithmetic: Arithmetic, format: str = "") -> float:
    """The sum over k of a[k] b[k], float32 values. format: what both are values of, if it is known.

    Zeros have no sign here, and a Hopper sum takes finite values only.
    """
    if arithmetic.operands:
        format = arithmetic.operands
        narrow = formats.get(format)
        a, b = ([float(round_number(_exact(v), narrow, overflow="saturate")) for v in side] for side in (a, b))
    size = arithmetic.chunk or max(len(a), 1)
    parts = [_sum(a[s : s + size], b[s : s + size], arithmetic, format) for s in range(0, len(a), size)]
    total: Number = parts[0] if parts and not arithmetic.chunk else Fraction(0)
    for part in parts if arithmetic.chunk else []:
        total = round_number(add(total, part), number(arithmetic.outer), arithmetic.rounding, arithmetic.overflow)
    y = round_number(total, number(arithmetic.output), arithmetic.rounding, arithmetic.overflow)
    return float(_shifted(y, -arithmetic.shift))


def _shifted(x: Number, shift: int) -> Number:
    return x if isinstance(x, float) else x * Fraction(2) ** shift


def _exact(x: float) -> Number:
    return Fraction(x) if math.isfinite(x) else x
