"""Watch gradients underflow: warn once per layer when FP8 loses most of one, and name the layer.

A site underflows in a step if over half of its non-zero gradient elements quantized to zero. Five such steps running give a
warning. The counts arrive as the "gradient" of the meter, one row per site and backward pass, and are summed over the
backward passes of a step (gradient accumulation, several calls of one module); those of kernels arrive summed. The host never waits for
a GPU: a step's counts are judged once they have come.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

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
        self._coming: deque[list[tuple[tuple[str, ...], Tensor, Any]]] = deque()  # steps that are over: slots, counts on the host, event

    def fold(self, slots: list[str], rows: Tensor) -> None:
        """Take the rows [len(slots), 2] of one backward pass: non-zero gradient elements, and those of them that became zero."""
        key = (rows.device, tuple(slots))
        sums = rows.detach().double()  # a copy: the counts of many passes, exact
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def end_step(self) -> None:
        """Judge the step that is over; called at the first training forward after an optimizer step."""
        self._coming.append([(slots, *_to_host(rows)) for (_, slots), rows in self._sums.items()])
        self._sums.clear()
        while self._coming and all(event is None or event.query() for _, _, event in self._coming[0]):
            self._judge([(slots, rows) for slots, rows, _ in self._coming.popleft()])

    def _judge(self, step: list[tuple[tuple[str, ...], Tensor]]) -> None:
        counts: dict[str, list[float]] = {}
        for slots, rows in step:
            for name, (nonzero, flushed) in zip(slots, rows.tolist(), strict=True):
                total = counts.setdefault(name, [0.0, 0.0])
                total[0] += nonzero
                total[1] += flushed
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


def _to_host(rows: Tensor) -> tuple[Tensor, Any]:
    """`rows` on the host, and the event after which they are there; None where they are at once."""
    if not rows.is_cuda:
        return rows, None
    copied = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copied.copy_(rows, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(rows.device))
    return copied, event
