"""Records: what kernels measure, in memory that belongs to one rewritten graph of one model, read when a step is over.

    casts   float32 [n, 4]           a row per cast whose amax is kept          (ops/casts.py: RECORD)
    sites   float32 [sites, 3, 4]    a row per site and gradient role           (ops/quantize.py: GRADIENTS)

Kernels raise amax and add counts by atomics, over all forwards and backwards of a step: microbatches are merged by that. Calls that must
not count (evaluation) write to a second set of rows that nobody reads. Reading is one gather and one scatter on the device, and a copy of
the counts to the host that nobody waits for.

An amax of 0 says that nothing was measured, or nothing but zeros: the slot keeps its scale and its history either way.
"""

from __future__ import annotations

import contextlib
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
        # (of the casts, of the sites), for calls that count and for those that do not. No views: a compiler takes their sizes for symbolic.
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def inputs(self, device: torch.device, recording: bool) -> tuple[Tensor, Tensor]:
        """float32 [casts, RECORD] and [sites, 3, RECORD]: of the step if `recording`, else of rows that nobody reads."""
        if not self._pairs or self._pairs[0][0].device != device:
            self._allocate(device)
        self.used |= recording
        return self._pairs[0 if recording else 1]

    def _allocate(self, device: torch.device) -> None:
        shapes = (self.count, RECORD), (len(self.sites), len(GRADIENTS), RECORD)
        with torch.inference_mode(False), torch.no_grad():
            self._pairs = [tuple(torch.zeros(shape, device=device) for shape in shapes) for _ in range(2)]  # type: ignore[misc]
            self._where = [torch.tensor(v, dtype=torch.int64, device=device) for v in (self.places, self.rows)]

    def fold(self, scaling: ScalingState, monitor: UnderflowMonitor) -> None:
        """The step is over: amax goes to the scaling state, counts to the monitor, and the rows start anew."""
        if not self.used:
            return
        self.used = False
        casts, sites = self._pairs[0]
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            if self.places:
                places, rows = self._where
                amax = torch.cat([casts, sites.view(-1, RECORD)])[:, 0][places]
                scaling.merge(rows, torch.where(amax > 0, amax, UNMEASURED), self.rows)
            if self.sites:
                monitor.fold(self.sites, sites[:, 0, 1:3])
            torch._foreach_zero_([casts.data, sites.data])  # autograd may hold them for a backward to come, and is not told
