"""Data parallelism: one amax for all processes, and random bits of each process's own.

    forward in DDP      which group is around the model; this process's place in its random stream
    optimizer stepped   amax = max over the group's processes, of every record
    begin of a step     the amax enters the history, as in one process (fp8fx.scaling)

The exchange comes when the optimizer has stepped and not when the next step begins: a checkpoint lies between the two, often written by one
process alone. It is one all-reduce of float32 [records], after one of four integers that says whether all processes have the same records.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp8fx.clone import runtimes_of
from fp8fx.errors import ModelError
from fp8fx.passes.contract import Slot
from fp8fx.scaling import ScalingState

AUTO, NONE = "auto", "none"
Group = Any  # torch.distributed.ProcessGroup, which is missing where torch is built without it


def reduce_amax(fast: nn.Module, group: Group = AUTO) -> None:
    """Whose amax the scales of delayed scaling follow: the largest of which processes.

    group: "auto", as it is without this call: the processes of the DistributedDataParallel that the model is called in. "none": each
    process by itself. A torch.distributed.ProcessGroup: its processes, whatever is around the model; all of them must train it and
    step its optimizer equally often. The group's ranks also choose the random bits of stochastic rounding.

    `fast` is a compiled model, also under torch.compile(backend="fp8fx") after its first call; a copy of it starts with "auto".
    Raises ModelError for anything else.
    """
    runtimes = runtimes_of(fast)
    if not runtimes:
        raise ModelError("this model is not compiled by fp8fx (or, under torch.compile, not called yet): it has no amax to reduce")
    if group is None:
        raise ModelError(
            "group is None, which is also what torch.distributed.group.WORLD is before init_process_group(): call that first, or say "
            '"none" for scales of each process\'s own'
        )
    if group not in (AUTO, NONE) and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ModelError(f'group is "auto", "none" or a torch.distributed.ProcessGroup, got {group!r}')
    for runtime in runtimes:
        runtime.processes.wanted = group


class Processes:
    """The processes that train one model together, as far as its FP8 state goes. One belongs to each Runtime."""

    def __init__(self) -> None:
        self.wanted: Group = AUTO
        self.group: Group | None = None  # around the last call
        self.pending = False  # amax was recorded since the last exchange
        self._together = False  # the last call that recorded was one of all processes
        self._inside: weakref.ref[nn.Module] | None = None  # a DDP module known to hold the model

    def enter(self, root: weakref.ref[nn.Module] | None) -> int:
        """A call of the model `root` begins: find its group. Returns this process's rank there, 0 where it is alone.

        Outside of DDP the group of the last call stays: a recomputation in backward belongs to a forward inside.
        """
        if self.wanted is not AUTO:
            self.group = None if self.wanted is NONE else self.wanted
        elif (ddp := active_ddp()) is not None and self._holds(ddp, root() if root is not None else None):
            self.group = ddp.process_group
        return 0 if self.group is None else dist.get_rank(self.group)

    def _holds(self, ddp: DistributedDataParallel, root: nn.Module | None) -> bool:
        if self._inside is None or self._inside() is not ddp:
            if all(module is not root for module in ddp.module.modules()):
                return False
            self._inside = weakref.ref(ddp)
        return True

    def recording(self, recording: bool) -> bool:
        """Whether a call records amax; if it runs in a group, its processes exchange that later."""
        if recording:
            self._together = self.group is not None and (self.wanted is not AUTO or active_ddp() is not None)
            self.measured()
        return recording

    def measured(self) -> None:
        """Amax was recorded by the forward that began last, or by its backward."""
        self.pending |= self._together

    def merge(self, scaling: ScalingState) -> None:
        """Collective: the largest amax of all processes, for every record, in each of them. Nothing if nothing was recorded since."""
        if not self.pending or not len(scaling):
            return
        self.pending = False
        rows = [scaling.slots[slot] for slot in agree(scaling, self.group)]
        order = torch.tensor(rows, device=scaling.amax.device)
        merged = scaling.amax[order]
        dist.all_reduce(merged, dist.ReduceOp.MAX, group=self.group)
        unknown = len(scaling.measured | scaling.settled) < len(rows)  # only then the host looks at what the others measured
        scaling.merge(order, merged, [row for row, amax in zip(rows, merged.tolist(), strict=True) if amax >= 0] if unknown else ())


def state_alone(scaling: ScalingState) -> dict[str, Tensor]:
    """The state after a calibration that the processes have not exchanged yet, as this one sees it. Nothing moves, nobody waits."""
    kept = {**vars(scaling), **{field: value.clone() for field, value in scaling.tensors.items()}, "settled": set(scaling.settled)}
    scaling.step(at_once=True)
    entries = scaling.state()
    vars(scaling).update(kept)
    return entries


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running; torch keeps it for Dynamo."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def whole_graphs() -> contextlib.AbstractContextManager[Any]:
    """While entered inside DDP, Dynamo hands graphs over whole.

    It would cut them at the borders of DDP's buckets, so that Inductor's backwards overlap with the exchange of gradients. fp8fx knows the
    parts of a cut graph as graphs after a break: names, first and last layers and delayed scales would depend on bucket sizes.
    """
    return contextlib.nullcontext() if active_ddp() is None else torch._dynamo.config.patch(optimize_ddp=False)


def agree(scaling: ScalingState, group: Group) -> list[Slot]:
    """Collective: the records of all processes, in one order. Those that only others have are added, unmeasured here.

    Processes may capture graphs in another order, or layers that others have not reached yet.
    Raises ModelError in every process if two of them have different recipes.
    """
    slots = sorted(scaling.slots, key=repr)
    digest = int.from_bytes(hashlib.sha256(repr(slots).encode()).digest()[:7], "big")
    header = torch.tensor([len(slots), -len(slots), digest, -digest], device=_header_device(scaling, group))
    dist.all_reduce(header, dist.ReduceOp.MAX, group=group)
    found = header.tolist()
    if found[0] == -found[1] and found[2] == -found[3]:
        return slots
    gathered: list[list[Slot]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, slots, group=group)
    together = sorted({slot for each in gathered for slot in each}, key=repr)
    _check_one_recipe(together, gathered)
    scaling.indices(together)
    return together


def _header_device(scaling: ScalingState, group: Group) -> torch.device:
    """The host where the group has a backend for it, else where amax is: the host then waits for the device once per step."""
    on_host = "cpu" in dist.get_backend_config(group) or dist.get_backend(group) == "gloo"
    return torch.device("cpu") if on_host else scaling.amax.device


def _check_one_recipe(together: list[Slot], gathered: list[list[Slot]]) -> None:
    known: dict[tuple[str, str], Slot] = {}
    for slot in together:
        other = known.setdefault((slot.site, slot.role), slot)
        if other is not slot:
            forms = [f"{each.format}{' with powers of two' if each.power_of_two else ''}" for each in (other, slot)]
            ranks = [next(rank for rank, slots in enumerate(gathered) if each in slots) for each in (other, slot)]
            raise ModelError(
                f"the processes of one group train under different recipes: {slot.role} of {slot.site!r} is {forms[0]} in process "
                f"{ranks[0]} and {forms[1]} in process {ranks[1]}. Compile the model with one recipe in all of them, or give each its own "
                "scales with fp8fx.reduce_amax(model, 'none')"
            )
