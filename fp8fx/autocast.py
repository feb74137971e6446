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
_MODES: ContextVar[tuple[str, ...]] = ContextVar("fp8fx.autocast", default=())  # of the regions around, the innermost last


def mode() -> str:
    """How a compiled model called here and now runs: fp8, off or calibrating."""
    return (FP8, *_MODES.get())[-1]


class autocast(contextlib.ContextDecorator):
    """How compiled models run inside: a context manager, and a decorator.

    enabled: False runs them in high precision. calibrating: also high precision, whatever `enabled` says, and records the amax of
    every role whose scaling is delayed, in evaluation too; the scales follow at the first call outside. Of recipes without
    delayed scaling nothing is recorded.

    Regions nest, the innermost counts, and the one before is restored however a region is left. It holds for the thread (and the
    asyncio task) that entered it. What counts is the forward: its backward runs as the forward did, wherever it is called.

    Inside a function that torch.compile captures (a forward of the model) it would break the graph: enter it around the call.
    Raises ModelError for arguments that are not bool.
    """

    def __init__(self, enabled: bool = True, calibrating: bool = False) -> None:
        for name, value in (("enabled", enabled), ("calibrating", calibrating)):
            if not isinstance(value, bool):
                raise ModelError(f"fp8fx.autocast({name}=...): got {value!r}, allowed are True and False")
        self.mode = CALIBRATING if calibrating else FP8 if enabled else OFF

    def __enter__(self) -> autocast:
        _MODES.set((*_MODES.get(), self.mode))
        return self

    def __exit__(self, *problem: Any) -> None:
        _MODES.set(_MODES.get()[:-1])
