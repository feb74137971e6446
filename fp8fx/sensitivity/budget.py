"""A loss budget: how far the loss in FP8 may lie above the loss in high precision.

    "1%"          relative: loss - high <= 0.01 |high|
    0.02, "0.02"  absolute: loss - high <= 0.02

Both losses are means over the same batches. A loss in FP8 that is lower meets every budget; one that is NaN meets none.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fp8fx.errors import ModelError


@dataclass(frozen=True)
class Budget:
    """value: a share of the loss in high precision if `relative`, else an increase."""

    value: float
    relative: bool

    @staticmethod
    def parse(given: Any) -> Budget:
        """A Budget, a number or a text. Raises ModelError for what is none, negative or not finite."""
        if isinstance(given, Budget):
            return given
        found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", given) if isinstance(given, str) else None
        try:
            if isinstance(given, bool) or not (found or isinstance(given, (int, float))):
                raise ValueError
            value = float(found[1]) if found else float(given)
        except ValueError:
            raise ModelError(f"budget {given!r}: {_ALLOWED}") from None
        if not math.isfinite(value) or value < 0:
            raise ModelError(f"budget {given!r}: it is finite and not negative; {_ALLOWED}")
        return Budget(value / 100, True) if found and found[2] else Budget(value, False)

    def limit(self, high: float) -> float:
        """The largest loss that meets the budget."""
        return high + (self.value * abs(high) if self.relative else self.value)

    def met(self, loss: float, high: float) -> bool:
        return loss <= self.limit(high)  # NaN <= x is False

    def __str__(self) -> str:
        return f"{self.value * 100:.6g}%" if self.relative else f"{self.value:.6g}"


_ALLOWED = "allowed are a relative increase such as '1%' and an absolute one such as 0.02"


def increase(loss: float, high: float) -> str:
    """`+0.0123 (+1.2%)`: how far `loss` lies above `high`."""
    difference = loss - high
    share = f" ({difference / abs(high):+.2%})" if high and math.isfinite(difference) else ""
    return f"{difference:+.4g}{share}"
