"""Whether the products of two formats' codes fit the formats that they are rounded to and summed in."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fp8fx import formats
from fp8fx.arithmetic.numbers import number
from fp8fx.arithmetic.spec import HOPPER, Arithmetic

SMALLEST_SHIFT = -60


def overflow_note(arithmetic: Arithmetic, products: Iterable[tuple[str, str]]) -> str | None:
    """What a user should know where one product of codes, times 2^shift, may be above the largest value of `products` or `accumulate`.

    products: the formats of the two operands of each matrix product that has this arithmetic. None where nothing becomes inf or NaN:
    every single product fits, or overflow saturates, or rounding is toward zero.
    """
    if arithmetic.overflow == "saturate" or arithmetic.rounding == "toward_zero":
        return None
    largest, pair = max(((_largest(arithmetic, pair), pair) for pair in products), default=(0.0, ("", "")))
    kept = {key: number(name) for key in ("products", "accumulate") if (name := getattr(arithmetic, key)) != HOPPER}
    key, narrow = min(kept.items(), key=lambda item: item[1].max)
    if largest * 2.0**arithmetic.shift <= narrow.max:
        return None
    shift = math.floor(math.log2(narrow.max / largest))
    shift -= largest * 2.0**shift > narrow.max  # log2 rounds
    holds = f"shift: {shift} is the largest that holds one product" if shift >= SMALLEST_SHIFT else "no shift holds even one product"
    return (
        f"arithmetic may overflow to inf or NaN: products of {pair[0]} and {pair[1]} codes reach {largest * 2.0**arithmetic.shift:g}, and "
        f"{key}: {narrow.name} ends at {narrow.max:g}; {holds}, sums need more room (or overflow: saturate)"
    )


def _largest(arithmetic: Arithmetic, pair: tuple[str, str]) -> float:
    """The magnitude of the largest product, as an exact multiplier has it (Mitchell's has no larger one); of a code table its largest."""
    table = arithmetic.table(None)
    if table is not None and table.mantissa_bits is None:
        return float(table.table.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return formats.get(pair[0]).max * formats.get(pair[1]).max
