"""The FP8 state of a checkpoint that comes in several files, loaded one by one: it counts once all of it is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.scaling import is_whole


class Shards:
    """Collects the entries of a Runtime's state, without their prefix."""

    def __init__(self) -> None:
        self._entries: dict[str, Tensor] = {}
        self.completed = False  # since the model last ran: a file without entries that follows may belong to that state
        self.waiting = False  # there is something to give up

    def add(self, entries: Mapping[str, Tensor], runtime: Any) -> dict[str, Tensor] | None:
        """The whole state, if `entries` complete it. `runtime` is whose state it is."""
        if self._entries.keys() & entries.keys():
            self.drop()  # an entry twice: another checkpoint begins
        self._entries |= entries
        self.waiting = True
        runtime.weights.clear()  # weights were in that file
        if "stream" not in self._entries or (runtime.recipe.keeps_scales and not is_whole(self._entries)):
            return None
        self.completed = True
        return self.drop()

    def drop(self) -> dict[str, Tensor]:
        """What is there; nothing is left."""
        entries, self._entries = self._entries, {}
        return entries

    def give_up(self) -> None:
        """The model runs: if there is a part, the rest has not come."""
        self.completed = self.waiting = False
        if not self._entries:
            return
        self.drop()
        warnings.warn(
            "fp8fx: a checkpoint was loaded that holds only a part of the FP8 state, which is left out as a whole: scales and the random "
            "stream go on as they were. Load all of its files, or leave that part away with fp8fx.strip(state_dict).",
            FP8Warning,
            stacklevel=5,
        )
