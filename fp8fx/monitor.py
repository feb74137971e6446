"""Watch gradients underflow: warn once per layer when FP8 loses most of one, and name the layer.

A site underflows in a step if over half of its non-zero gradient elements quantized to zero. Five such steps running give a
warning. The counts arrive as the "gradient" of the meter, one row per site and backward pass, and are summed over the
backward passes of a step (gradient accumulation, several calls of one module).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fp8fx.errors import FP8Warning

SHARE = 0.5
STEPS = 5


class UnderflowMonitor:
    """Counts per site name. Off the hot path: they are summed on their device until the step is over."""

    def __init__(self, formats: dict[str, str], advice: str) -> None:
        """formats: site -> format of its gradient, for the message. advice: what to do about it."""
        self.formats = formats
        self.advice = advice
        self.running: dict[str, int] = {}
        self.last_share: dict[str, float] = {}
        self.warned: set[str] = set()
        self._sums: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}

    def fold(self, slots: list[str], rows: Tensor) -> None:
        """Take the rows [len(slots), 2] of one backward pass: non-zero gradient elements, and those of them that became zero."""
        key = (rows.device, tuple(slots))
        sums = rows.detach().double()  # a copy: the counts of many passes, exact
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def end_step(self) -> None:
        """Judge the step that is over; called at the first training forward after an optimizer step."""
        counts: dict[str, list[float]] = {}
        for (_, slots), rows in self._sums.items():
            for name, (nonzero, flushed) in zip(slots, rows.tolist(), strict=True):
                total = counts.setdefault(name, [0.0, 0.0])
                total[0] += nonzero
                total[1] += flushed
        self._sums.clear()
        for name, (nonzero, flushed) in counts.items():
            if nonzero == 0:
                continue
            share = flushed / nonzero
            self.last_share[name] = share
            self.running[name] = self.running.get(name, 0) + 1 if share > SHARE else 0
            if self.running[name] >= STEPS and name not in self.warned:
                self._warn(name, share)

    def _warn(self, name: str, share: float) -> None:
        self.warned.add(name)
        warnings.warn(
            f"fp8fx: gradients underflow at layer {name!r}: {share:.0%} of their non-zero elements became zero in "
            f"{self.formats.get(name, 'FP8')}, {STEPS} steps running. {self.advice}",
            FP8Warning,
            stacklevel=2,
        )
