"""`fp8fx.DistributedState`: a compiled model and its optimizer for torch.distributed.checkpoint (DCP).

    state = {"fp8fx": fp8fx.DistributedState(fast, optimizer)}
    dcp.save(state, checkpoint_id=directory)        on every rank
    dcp.load(state, checkpoint_id=directory)

DCP fills tensors it is given and must know their names and shapes beforehand. A fresh model has no delayed scales yet, nor a fresh
optimizer its state. The optimizer's is made by torch's own get_optimizer_state_dict; fp8fx's state travels as one object: a safetensors
blob with the state of every rank, since ranks differ in what they measured in the step so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fp8fx.checkpoint.loading import refusal
from fp8fx.checkpoint.migrate import Difference, FP8Plan, plan_part
from fp8fx.checkpoint.parts import Model, find, listed
from fp8fx.clone import PREFIX
from fp8fx.errors import CheckpointError
from fp8fx.state import OPTIMIZER_STEPS

USAGE = "fp8fx.DistributedState(model, optimizer)"


class DistributedState:
    """A Stateful object for dcp.save and dcp.load, to be made on every rank.

    fast, scaler: as for fp8fx.save. optimizer: one optimizer of the model. migrate: as for fp8fx.load; `migrated` lists what was done.

    A checkpoint may be loaded by another number of ranks: a new rank takes the first one's state, with the largest amax of the step so
    far. Gradients are not saved: save between optimizer steps. DCP writes into the model while it reads, and pickles its metadata and
    all that is no tensor: of the promises of fp8fx.load only the checks of fp8fx's own state hold here.
    """

    def __init__(self, fast: torch.nn.Module, optimizer: Any = None, scaler: Any = None, migrate: bool = False) -> None:
        self.model: Model = find(fast, USAGE)
        self.optimizers, self.scalers = listed(optimizer, "optimizer", USAGE), listed(scaler, "scaler", USAGE)
        if len(self.optimizers) > 1 or len(self.scalers) > 1:
            raise CheckpointError(f"{USAGE} takes one optimizer and one scaler; make several, under names of their own")
        self.migrate = migrate
        self.migrated: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Called by DCP on every rank, for saving as for loading."""
        import torch.distributed.checkpoint.state_dict as dcp  # not for builds of torch without torch.distributed

        found: dict[str, Any] = {"model": self.model.entries(), "fp8": self._fp8()}
        for optimizer in self.optimizers:
            with OPTIMIZER_STEPS.paused():  # torch steps a fresh optimizer once, with a learning rate of 0, to see what it keeps
                found["optimizer"] = dcp.get_optimizer_state_dict(self.model.root, optimizer, options=_flat())
        for scaler in self.scalers:
            found["scaler"] = {"state": scaler.state_dict()}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by DCP when it has filled what `state_dict` gave."""
        import torch.distributed.checkpoint.state_dict as dcp

        plans, differences = self._plans(state["fp8"])
        if differences and not self.migrate:
            call, outcome = "fp8fx.DistributedState(..., migrate=True)", "fp8fx's state and the optimizer were not loaded"
            raise CheckpointError(refusal("the checkpoint", differences, call, outcome))
        with torch.inference_mode(False), torch.no_grad():
            self.model.root.load_state_dict(state["model"], strict=True)
            for optimizer in self.optimizers:
                with OPTIMIZER_STEPS.paused():
                    dcp.set_optimizer_state_dict(self.model.root, optimizer, state["optimizer"], options=_flat())
            for scaler in self.scalers:
                scaler.load_state_dict(state["scaler"]["state"])
            for prefix, plan in plans.items():
                self.model.runtimes[prefix].load_state(plan.state, plan.convert)
        self.migrated = [str(difference) for difference in differences]

    def _fp8(self) -> bytes:
        """Entries `<rank>/<prefix>_fp8fx.<key>` of all ranks, the same bytes on each."""
        own = {
            f"{prefix}{PREFIX}{key}": value.cpu().contiguous()
            for prefix, state in self.model.state().items()
            for key, value in state.items()
        }
        every: list[dict[str, Tensor]] = [own]
        if dist.is_available() and dist.is_initialized():
            every = [own] * dist.get_world_size()
            dist.all_gather_object(every, own)
        entries = {f"{rank}/{key}": value for rank, state in enumerate(every) for key, value in state.items()}
        return safetensors.torch.save(entries, {"recipes": json.dumps(self.model.recipes()), "ranks": str(len(every))})

    def _plans(self, blob: bytes) -> tuple[dict[str, FP8Plan], list[Difference]]:
        entries = safetensors.torch.load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        state = _of_rank(entries, rank, int(header["ranks"]))
        recipes, plans, differences = json.loads(header["recipes"]), {}, []
        for prefix, runtime in self.model.runtimes.items():
            start = f"{prefix}{PREFIX}"
            ours = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            plans[prefix], found = plan_part(prefix, runtime, recipes.get(prefix), ours, self.model.modules(prefix))
            differences += found
        return plans, differences


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def _of_rank(entries: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """The state of `rank`; of a rank that was not there, the first one's with the amax of all."""
    states = [{key.partition("/")[2]: value for key, value in entries.items() if key.startswith(f"{r}/")} for r in range(ranks)]
    if rank < ranks and ranks == _world():
        return states[rank]
    merged = dict(states[0])
    for key in merged:
        if key.endswith(".amax"):
            merged[key] = torch.stack([state[key] for state in states if key in state]).amax(0)
    return merged


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
