"""`fp8fx.autocast`: switch compiled models to high precision, or to calibration, for a while. Nothing is captured again.

with fp8fx.autocast(enabled=False):
    reference = fast(x)                     # the captured graph as it was, in high precision
with fp8fx.autocast(calibrating=True):
    fast(x).sum().backward()                # high precision; amax of every delayed role is recorded
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any

from fp8fx.errors import ModelError

FP8, OFF, CALIBRATING = "fp8", "off", "calibrating"
_REGIONS: ContextVar[tuple[autocast, ...]] = ContextVar("fp8fx.autocast", default=())  # those around, the innermost last


def mode() -> str:
    """How a compiled model called here and now runs: fp8, off or calibrating."""
    regions = _REGIONS.get()
    return regions[-1].mode if regions else FP8


class autocast(contextlib.ContextDecorator):
    """How compiled models run inside: a context manager, and a decorator.

    enabled: False runs them in high precision. calibrating: also high precision, whatever `enabled` says, and records the amax of
    every role whose scaling is delayed, in evaluation too; the scales follow at the first call outside. Of recipes without
    delayed scaling nothing is recorded.

    Regions nest, the innermost counts, and the one before is restored however a region is left. It holds for the thread (and the
    asyncio task) that entered it. What counts is the forward: its backward runs as the forward did, wherever it is called.

    Enter it around the call: inside a forward that is captured, Dynamo gives up the frame that enters it, which then runs in high
    precision as a whole. A torch.utils.checkpoint around the model runs it again in the mode of its backward: put the region around
    both. A decorated coroutine or generator function is not covered.
    Raises ModelError for arguments that are not bool.
    """

    def __init__(self, enabled: bool = True, calibrating: bool = False) -> None:
        for name, value in (("enabled", enabled), ("calibrating", calibrating)):
            if not isinstance(value, bool):
                raise ModelError(f"fp8fx.autocast({name}=...): got {value!r}, allowed are True and False")
        self.mode = CALIBRATING if calibrating else FP8 if enabled else OFF

    def __enter__(self) -> autocast:
        _REGIONS.set((*_REGIONS.get(), self))
        return self

    def __exit__(self, *problem: Any) -> None:
        regions = list(_REGIONS.get())
        if self in regions:  # the last of its own: a generator that is closed late leaves its own region, not the innermost
            del regions[len(regions) - 1 - regions[::-1].index(self)]
        _REGIONS.set(tuple(regions))
