"""Scales that are kept between steps: the state of delayed scaling, one record per Slot (site and role) of a model.

    begin of a step   history, scale = delayed_update(history, scale, amax of the step before)
    every forward     scales are read; the amax of forward roles is merged by max
    every backward    the amax of gradient roles is merged by max

A step begins at the first training forward after an optimizer step, so microbatches share one scale and are merged. Evaluation reads
the scales and changes nothing. A slot nobody measured in a step (a layer that was not reached) keeps scale and history.

All slots lie in three tensors, so that a step is one vectorised update, and a forward one gather and one scatter, without a host sync.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import FP8Warning, ModelError
from fp8fx.numerics.delayed import delayed_scale, delayed_update
from fp8fx.ops.available import triton_works
from fp8fx.ops.quantize import UNMEASURED
from fp8fx.passes.contract import Slot
from fp8fx.recipe.sections import Delayed

LOG = logging.getLogger("fp8fx")
ORDER = {"before": "history_first", "after": "scale_first"}  # is the scale renewed before this step's tensors are quantized, or after?
APART = 4  # elements from one scale to the next, where each must start at 16 bytes
FIELDS = ("scale", "history", "amax")
MEANING, DUE = "delayed", "delayed.due"  # entries of a checkpoint: what the others mean; whether a step has ended


class ScalingState:
    """history [n, length], scale [n] and amax [n] of this step so far, float32; slots are added as graphs are made."""

    def __init__(self, rule: Delayed) -> None:
        self.rule = rule
        self.slots: dict[Slot, int] = {}
        self.due = False  # an optimizer stepped: the next training forward begins a step
        self.calibrated = False  # amax was measured while calibrating, and no scale has followed yet
        self.loaded: dict[str, Tensor] = {}  # entries of a checkpoint whose slots no graph has asked for yet
        self.loaded_formats: dict[str, Any] = {}
        self.convert = False  # loaded scales of another format are made anew from their history, and not refused
        self.measured: set[int] = set()  # rows that this step has measured, as far as the host knows
        self.settled: set[int] = set()  # rows whose scale came from a step, a calibration or a checkpoint
        self._fmax = torch.empty(0)  # of each slot's format, for the kernel
        self._powers: bool | Tensor = True  # whose scales are powers of two, bool [n] where they differ
        self._lock = threading.Lock()
        self._allocate(torch.device("cpu"), 0)

    def _allocate(self, device: torch.device, count: int) -> None:
        self.scale = torch.ones(count, device=device, dtype=torch.float32)
        self.history = torch.zeros(count, self.rule.history, device=device, dtype=torch.float32)
        self.amax = torch.full((count,), UNMEASURED, device=device, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {field: getattr(self, field) for field in FIELDS}

    def indices(self, slots: Iterable[Slot | None]) -> list[int]:
        """The rows of `slots`, added where they are new; 0 for None, which nobody reads."""
        return [0 if slot is None else self._index(slot) for slot in slots]

    def _index(self, slot: Slot) -> int:
        with self._locked():
            if slot not in self.slots:
                known = {_name(other): _format(other) for other in self.slots} | ({} if self.convert else self.loaded_formats)
                if problem := _mismatch(slot, known):
                    raise other_recipe(problem)
                self.slots[slot] = len(self.slots)
                self.scale = torch.cat([self.scale, self.scale.new_ones(1)])
                self.history = torch.cat([self.history, self.history.new_zeros(1, self.rule.history)])
                self.amax = torch.cat([self.amax, self.amax.new_full((1,), UNMEASURED)])
                self._fill(slot)
            return self.slots[slot]

    def _locked(self) -> contextlib.AbstractContextManager[Any]:
        """One thread at a time; and no inference tensors, which later training could not write."""
        return self._outside_inference() if torch.is_inference_mode_enabled() else self._lock

    @contextlib.contextmanager
    def _outside_inference(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            yield

    # -- calls ----------------------------------------------------------------------------------------------------------

    def read(self, indices: Tensor) -> Tensor:
        """Scales of `indices` (int64, any shape), a copy on their device. On a GPU each starts at 16 bytes, as cuBLAS wants it."""
        if self.scale.device != indices.device:
            with self._locked():
                self._move(indices.device)
        if not indices.is_cuda:
            return self.scale[indices]
        strides = [APART * stride for stride in indices.stride()]
        padded = torch.empty_strided(indices.shape, strides, dtype=torch.float32, device=indices.device)
        return padded.copy_(self.scale[indices])

    def merge(self, indices: Tensor, amax: Tensor, rows: Iterable[int] = ()) -> None:
        """Merge `amax` into this step's, by max. `indices`: int64 [m], a slot may occur twice; `amax`: float32 [m].

        rows: the indices on the host, of what was really measured.
        """
        self.measured.update(rows)
        with self._locked():
            self._move(indices.device)
            self.amax.scatter_reduce_(0, indices, amax.detach().float(), "amax")

    def step(self, at_once: bool = False) -> None:
        """The step is over: its amax enters the history, and the scales follow; `at_once` even where the order is `after`."""
        order = ORDER["before"] if at_once else ORDER[self.rule.order]
        with self._locked():
            if not self._step_by_kernel(order):
                self._step_by_reference(order)
            self.due = self.calibrated = False
            self.settled |= self.measured
            self.measured = set()

    def _step_by_kernel(self, order: str) -> bool:
        """One launch for all slots, in place: forwards in flight have copies of their scales. False where there is no kernel."""
        if not self.scale.is_cuda or not triton_works():
            return False
        from fp8fx.kernels.delayed import delayed_update as update
        from fp8fx.kernels.launch import KernelCompileError

        if self._fmax.numel() != len(self.slots) or self._fmax.device != self.scale.device:
            self._fmax = torch.tensor([formats.get(slot.format).max for slot in self.slots], device=self.scale.device)
            powers = [slot.power_of_two for slot in self.slots]
            self._powers = powers[0] if len(set(powers)) == 1 else torch.tensor(powers, device=self.scale.device)
        try:
            rule = (self.rule.algorithm, self.rule.margin, self._powers, order, UNMEASURED)
            update(self.history, self.scale, self.amax, self._fmax, *rule)
        except KernelCompileError as error:
            warnings.warn(f"fp8fx: {error}", FP8Warning, stacklevel=2)
            return False
        return True

    def _step_by_reference(self, order: str) -> None:
        history, scale = self.history.clone(), self.scale.clone()
        for (format, power_of_two), rows in self._groups().items():
            chosen = torch.tensor(rows, device=scale.device)
            rule = (self.rule.algorithm, self.rule.margin, power_of_two, order)
            renewed = delayed_update(self.history[chosen], self.scale[chosen], self.amax[chosen], format, *rule)
            measured = self.amax[chosen] >= 0
            history[chosen] = torch.where(measured.unsqueeze(1), renewed[0], self.history[chosen])
            scale[chosen] = torch.where(measured, renewed[1], self.scale[chosen])
        self.history, self.scale = history, scale
        self.amax = torch.full_like(self.amax, UNMEASURED)

    def _groups(self) -> dict[tuple[str, bool], list[int]]:
        groups: dict[tuple[str, bool], list[int]] = {}
        for slot, index in self.slots.items():
            groups.setdefault((slot.format, slot.power_of_two), []).append(index)
        return groups

    def _move(self, device: torch.device) -> None:
        """To where the model is now: it may have been moved since."""
        if self.scale.device != device:
            self.scale, self.history, self.amax = (t.to(device) for t in (self.scale, self.history, self.amax))

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Plain tensors by `<site>.<role>.<field>`: scale (), history [length], amax () of the step so far (-1: not measured).

        `delayed` says what they mean: JSON as uint8 [n], with the rule and the formats. `delayed.due`: bool (), a step has ended.
        """
        with self._lock:
            entries, formats = dict(self.loaded), dict(self.loaded_formats)
            for slot, index in self.slots.items():
                entries |= {_key(slot, field): tensor[index].clone() for field, tensor in self.tensors.items()}
                formats[_name(slot)] = _format(slot)
            meaning: dict[str, Any] = {"rule": self.rule.model_dump(), "formats": formats}
            meaning |= {"convert": True} if self.convert and self.loaded else {}  # the promise of a migration is kept for those too
            return entries | {MEANING: _from_json(meaning), DUE: torch.tensor(self.due, device="cpu")}

    def load(self, entries: Mapping[str, Tensor], convert: bool = False) -> None:
        """Take what `state` gave; slots without an entry start anew. Raises ModelError, and changes nothing, for another recipe's.

        convert: scales of another format are made anew from their history instead.
        """
        self.check(entries, convert)
        rest = {key: value.detach().clone() for key, value in entries.items() if key not in (MEANING, DUE)}
        with self._locked():
            self._allocate(self.scale.device, len(self.slots))
            self.loaded, self.loaded_formats = rest, dict(meaning_of(entries).get("formats", {}))
            self.due, self.convert = bool(entries.get(DUE, False)), convert or _converts(entries)
            self.calibrated, self.measured, self.settled = False, set(), set()
            for slot in self.slots:
                self._fill(slot)

    def check(self, entries: Mapping[str, Tensor], convert: bool = False) -> None:
        """ModelError if `load` would raise it."""
        if DUE in entries and entries[DUE].numel() != 1:
            raise ModelError(f"{DUE!r} of the state is damaged: its shape is {list(entries[DUE].shape)}, expected []")
        rest = {key: value for key, value in entries.items() if key not in (MEANING, DUE)}
        if problem := self._problem(rest, meaning_of(entries), convert or _converts(entries)):
            raise other_recipe(problem)

    def snapshot(self) -> dict[str, Any]:
        """For `restore`. Tensors are not copied: `load` makes new ones."""
        found = {key: value for key, value in vars(self).items() if key != "_lock"}
        return {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in found.items()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        vars(self).update(snapshot)

    def forget(self) -> None:
        """Drop entries of a checkpoint that no graph has asked for: another one takes its place."""
        self.loaded, self.loaded_formats = {}, {}

    def _fill(self, slot: Slot) -> None:
        row, found = self.slots[slot], self.loaded_formats.pop(_name(slot), None)
        for field, tensor in self.tensors.items():
            value = self.loaded.pop(_key(slot, field), None)
            if value is not None:
                tensor[row] = value.to(tensor)
                if field == "history" and bool((value > 0).any()):
                    self.settled.add(row)
                if field == "amax" and bool(value >= 0):
                    self.measured.add(row)
        if self.convert and found is not None and _mismatch(slot, {_name(slot): found}):
            self._convert(slot, found)

    def _convert(self, slot: Slot, found: Sequence[Any]) -> None:
        """Give `slot`, whose scale is that of the format `found`, the scale its history asks for in its own."""
        row, rule = self.slots[slot], self.rule
        one = self.scale.new_ones(())
        self.scale[row] = delayed_scale(self.history[row], one, slot.format, rule.algorithm, rule.margin, slot.power_of_two)
        LOG.info("fp8fx: %s of %r was %s in the checkpoint: its scale is made anew for %s", slot.role, slot.site, found, _format(slot))

    def _problem(self, entries: Mapping[str, Tensor], meaning: Mapping[str, Any], convert: bool = False) -> str | None:
        """Why these entries cannot be this model's, or None."""
        here, there = self.rule.model_dump(), meaning.get("rule", {})
        for key in here:
            if key in there and there[key] != here[key]:
                return f"delayed.{key} is {there[key]!r} there and {here[key]!r} here"
        for slot in self.slots:
            if not convert and (problem := _mismatch(slot, meaning.get("formats", {}))):
                return problem
        shapes = {"scale": (), "history": (self.rule.history,), "amax": ()}
        for key, value in entries.items():
            field = key.rpartition(".")[2]
            if field not in shapes:
                return f"{key!r} is no entry of delayed scaling (those end in {', '.join(FIELDS)})"
            if tuple(value.shape) != shapes[field] or not value.is_floating_point():
                form = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
                return f"{key!r} is {form}, where delayed.history: {self.rule.history} gives float32 {list(shapes[field])}"
            if field == "scale" and not bool(torch.isfinite(value) & (value > 0)):
                return f"{key!r} is {value.item()}, which is no scale"
        return None


def is_scaling(key: str) -> bool:
    """An entry of a checkpoint is one of ScalingState's."""
    return key in (MEANING, DUE) or key.rpartition(".")[2] in FIELDS


def is_whole(state: Mapping[str, Tensor]) -> bool:
    """All entries of delayed scaling that a checkpoint has are in `state`, as far as they say themselves."""
    if MEANING not in state or DUE not in state:
        return False
    return all(f"{name}.{field}" in state for name in _to_json(state[MEANING]).get("formats", {}) for field in FIELDS)


def other_recipe(problem: str) -> ModelError:
    return ModelError(
        f"this state is of another recipe: {problem}. Load the weights alone (fp8fx.strip(state)), or compile the model with the recipe "
        "the state was made with"
    )


def _mismatch(slot: Slot, formats: Mapping[str, Any]) -> str | None:
    known = formats.get(_name(slot))
    if known is None or list(known) == _format(slot):
        return None
    there, here = (f"{name}{' with powers of two' if power else ''}" for name, power in (known, _format(slot)))
    return f"{slot.role} of {slot.site!r} is {there} there and {here} here"


def _name(slot: Slot) -> str:
    return f"{slot.site}.{slot.role}"


def _key(slot: Slot, field: str) -> str:
    return f"{_name(slot)}.{field}"


def _format(slot: Slot) -> list[Any]:
    return [slot.format, slot.power_of_two]


def meaning_of(entries: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the entries of a checkpoint mean: {"rule": ..., "formats": {`<site>.<role>`: [format, power_of_two]}}."""
    return _to_json(entries[MEANING]) if MEANING in entries else {}


def _converts(entries: Mapping[str, Tensor]) -> bool:
    """Saved after a migration, before every record was asked for: some are still of the earlier formats."""
    return bool(meaning_of(entries).get("convert", False))


def with_meaning(meaning: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entry that says so."""
    return {MEANING: _from_json(meaning)}


def _from_json(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def _to_json(value: Tensor) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(bytes(value.tolist()).decode())
    except (TypeError, ValueError) as error:
        raise ModelError(f"{MEANING!r} of the state is damaged: it is {value.dtype} and not JSON as uint8 ({error})") from None
    return found


def flat(rows: Sequence[Sequence[Slot | None]]) -> list[Slot | None]:
    return [slot for row in rows for slot in row]
