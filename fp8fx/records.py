"""Records: what kernels measure, in memory that belongs to one rewritten graph of one model, read when a step is over.

    records  float32 [n + 3 * sites, 4]     one row per cast whose amax is kept, then three per site: GRADIENTS      (ops/casts.py: RECORD)

Kernels raise amax and add counts by atomics, over all forwards and backwards of a step: microbatches are merged by that. Calls that must
not count (evaluation) write to a second set of rows that nobody reads. Reading is one gather and one scatter on the device, and a copy of
the counts to the host that nobody waits for.

An amax of 0 says that nothing was measured, or nothing but zeros: the slot keeps its scale and its history either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8fx.monitor import UnderflowMonitor
from fp8fx.ops.casts import RECORD
from fp8fx.ops.quantize import GRADIENTS, UNMEASURED
from fp8fx.passes.contract import Slot
from fp8fx.scaling import ScalingState


class Records:
    """Rows of one graph: `casts` forward rows with the slots each is measured for, then those of `sites`, with `gradients` their slots."""

    def __init__(
        self, casts: Sequence[tuple[Slot, ...]], sites: Sequence[str], gradients: Sequence[tuple[Slot | None, ...]], scaling: ScalingState
    ) -> None:
        self.count, self.sites = len(casts), list(sites)
        places = [(place, slot) for place, slots in enumerate(casts) for slot in slots]
        places += [
            (self.count + len(GRADIENTS) * site + role, slot)
            for site, row in enumerate(gradients)
            for role, slot in enumerate(row)
            if slot is not None
        ]
        self.places = [place for place, _ in places]  # rows here ...
        self.rows = scaling.indices(slot for _, slot in places)  # ... and those of the scaling state they belong to
        self.size = self.count + len(GRADIENTS) * len(self.sites)
        self.used = False  # a call has counted since the last fold
        self._buffer: Tensor | None = None

    def inputs(self, device: torch.device, recording: bool) -> tuple[Tensor, Tensor]:
        """float32 [casts, RECORD] and [sites, 3, RECORD]: of the step if `recording`, else of rows that nobody reads."""
        if self._buffer is None or self._buffer.device != device:
            self._allocate(device)
        self.used |= recording
        return self._views[0 if recording else 1]

    def _allocate(self, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():
            both = torch.zeros(2, self.size, RECORD, device=device)
            self._buffer = both[0]
            self._views = [self._split(rows) for rows in both]
            self._where = tuple(torch.tensor(v, dtype=torch.int64, device=device) for v in (self.places, self.rows))

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[: self.count], rows[self.count :].view(len(self.sites), len(GRADIENTS), RECORD)

    def fold(self, scaling: ScalingState, monitor: UnderflowMonitor) -> None:
        """The step is over: amax goes to the scaling state, counts to the monitor, and the rows start anew."""
        if not self.used or self._buffer is None:
            return
        self.used = False
        with torch.inference_mode(False), torch.no_grad():
            if self.places:
                places, rows = self._where
                amax = self._buffer[:, 0][places]
                scaling.merge(rows, torch.where(amax > 0, amax, UNMEASURED), self.rows)
            if self.sites:
                monitor.fold(self.sites, self._views[0][1][:, 0, 1:3])
            self._buffer.data.zero_()  # autograd may hold it for a backward to come, and is not told
