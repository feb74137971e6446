"""The definition of every rounding, written to be read: a search in the list of grid values with exact fractions. Slow.

    x lies between two neighbours lo <= |x| < hi of the list; the mode says which; ties to even look at the code of lo.

The list of the non-negative finite values, in order, is also the list by code, so that the position of a value is its code. The
tests hold the fast forms of `rounding` to this, and both to gfloat and ml_dtypes. Nothing else uses this module.
"""

from __future__ import annotations

import bisect
import functools
import math
import struct
from collections.abc import Iterable
from fractions import Fraction

from fp8fx import formats
from fp8fx.formats import Format


@functools.cache
def grid(format: Format) -> list[float]:
    """The non-negative finite values in ascending order, and after max the value that would follow it on the last step's grid."""
    values = [value for value in format.finite_values() if value >= 0.0]
    return [*values, format.beyond]


def round_value(x: float, format: str | Format, rounding: str = "nearest_even", overflow: str = "saturate", random_bits: int = 0) -> float:
    """`x` (a float64) in `format`, as a float. random_bits: an integer in [0, 2^32), read by `stochastic` only."""
    format = formats.get(format)
    if math.isnan(x):
        return math.nan
    if format.base is not None:
        if abs(x) in grid(format)[:-1] and (x >= 0.0 or format.signed):
            return x if x != 0.0 or format.signed_zero else 0.0
        y = round_value(x / format.factor, format.base, rounding, overflow, random_bits)  # a float64 quotient, by definition
        return struct.unpack("f", struct.pack("f", y * format.factor))[0]  # type: ignore[no-any-return]
    if x < 0.0 and not format.signed:
        return _unsigned(x, format, rounding, overflow, random_bits)
    magnitude = _round_magnitude(abs(x), x < 0.0, format, rounding, random_bits)
    if magnitude > format.max:
        magnitude = _overflow(x, format, rounding, overflow)
    if magnitude == 0.0 and not format.signed_zero:
        return 0.0
    return math.copysign(magnitude, x)


def _unsigned(x: float, format: Format, rounding: str, overflow: str, random_bits: int) -> float:
    """A negative number where there is no sign: 0, but NaN under `nonfinite` unless it rounds to 0."""
    return 0.0 if overflow == "saturate" or _round_magnitude(-x, True, format, rounding, random_bits) == 0.0 else math.nan


def _round_magnitude(a: float, negative: bool, format: Format, rounding: str, random_bits: int) -> float:
    """|x| rounded with no upper end; inf stands for everything from the end of the list on."""
    values = grid(format)
    if a >= values[-1]:
        return math.inf
    code = bisect.bisect_right(values, a) - 1
    lo, hi = values[code], values[code + 1]
    fraction = (Fraction(a) - Fraction(lo)) / (Fraction(hi) - Fraction(lo))
    away = {
        "nearest_even": fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and code % 2 == 1),
        "nearest_away": fraction >= Fraction(1, 2),
        "toward_zero": False,
        "up": fraction > 0 and not negative,
        "down": fraction > 0 and negative,
        "stochastic": math.floor(fraction * 2**32) + random_bits >= 2**32,
    }[rounding]
    return hi if away else lo


def _overflow(x: float, format: Format, rounding: str, overflow: str) -> float:
    """The magnitude of what came out above max."""
    keeps_max = rounding == "toward_zero" or (rounding == "up" and x < 0.0) or (rounding == "down" and x > 0.0)
    if overflow == "saturate" or (keeps_max and math.isfinite(x)):
        return format.max
    return math.inf if format.has_inf else math.nan


def round_values(values: Iterable[float], format: str | Format, rounding: str = "nearest_even", overflow: str = "saturate") -> list[float]:
    """`round_value` of each."""
    return [round_value(value, format, rounding, overflow) for value in values]
