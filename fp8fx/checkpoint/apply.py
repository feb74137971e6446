"""Putting loaded parts in place, and back as they were if one of them fails.

An Action remembers what is there (`remember`), changes it (`apply`) and can put it back (`undo`). All remember before the first applies.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fp8fx.checkpoint.format import dtype_name
from fp8fx.checkpoint.migrate import FP8Plan
from fp8fx.checkpoint.parts import Model
from fp8fx.errors import CheckpointError
from fp8fx.runtime import Runtime


class Action(Protocol):
    def remember(self) -> None: ...

    def apply(self) -> None: ...

    def undo(self) -> None: ...


def run(actions: Sequence[Action], path: str) -> None:
    """Apply all. On an error, or an interrupt, everything is as before; an error becomes a CheckpointError."""
    for action in actions:
        action.remember()
    started: list[Action] = []
    try:
        for action in actions:
            started.append(action)
            action.apply()
    except BaseException as error:
        for action in reversed(started):
            with contextlib.suppress(BaseException):  # whatever failed may fail again; the others are put back all the same
                action.undo()
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{path!r} could not be put in place, and everything is as it was before: {error}") from error


class ModelAction:
    """Parameters, buffers, modules' extra state, fp8fx's state and gradients. The values before are kept in the host's memory."""

    def __init__(self, model: Model, entries: Mapping[str, Any], plans: Mapping[str, FP8Plan], gradients: Mapping[str, Tensor]) -> None:
        self.model, self.entries, self.plans, self.gradients = model, entries, plans, gradients

    def _tensors(self) -> list[Tensor]:
        return [*self.model.root.parameters(), *self.model.root.buffers()]

    def remember(self) -> None:
        self.before = [(value, value.detach().to("cpu", copy=True)) for value in self._tensors()]
        self.rest = {key: value for key, value in self.model.entries().items() if not isinstance(value, Tensor)}
        self.grads = {name: parameter.grad for name, parameter in self.model.parameters().items()}
        self.states = {prefix: _fp8_state(runtime) for prefix, runtime in self.model.runtimes.items()}

    def apply(self) -> None:
        self.model.root.load_state_dict(self.entries, strict=True)
        for prefix, plan in self.plans.items():
            self.model.runtimes[prefix].load_state(plan.state, plan.convert)
        for name, parameter in self.model.parameters().items():
            parameter.grad = self.gradients.get(name)

    def undo(self) -> None:
        if self.rest:
            with contextlib.suppress(BaseException):  # a module's own code, which may be what failed
                self.model.root.load_state_dict(self.rest, strict=False)
        for value, old in self.before:
            value.copy_(old)
        for prefix, state in self.states.items():
            _put_back(self.model.runtimes[prefix], state)
        for name, parameter in self.model.parameters().items():
            parameter.grad = self.grads[name]


def _fp8_state(runtime: Runtime) -> dict[str, Any]:
    """What Runtime.load_state changes."""
    return {"stream": dataclasses.replace(runtime.stream), "_stepped": runtime._stepped, "scaling": runtime.scaling.snapshot()}


def _put_back(runtime: Runtime, state: dict[str, Any]) -> None:
    runtime.stream, runtime._stepped = state["stream"], state["_stepped"]
    runtime.scaling.restore(state["scaling"])
    runtime.weights.clear()


class StatefulAction:
    """Anything with state_dict and load_state_dict."""

    def __init__(self, target: Any, state: Any) -> None:
        self.target, self.state = target, state

    def remember(self) -> None:
        self.before = containers(self.target.state_dict())

    def apply(self) -> None:
        self.target.load_state_dict(self.state)

    def undo(self) -> None:
        self.target.load_state_dict(self.before)


class OptimizerAction(StatefulAction):
    """A torch optimizer, whose load_state_dict casts all state of a parameter to the parameter's dtype.

    That would round what is kept in more bits (ASGD's step sizes, master copies). It is meant only where the parameter's dtype changed.
    dtypes: of the parameters when they were saved, by their numbers in `state`.
    """

    def __init__(self, target: Any, state: Any, dtypes: Mapping[int, str]) -> None:
        super().__init__(target, state)
        self.dtypes = dtypes

    def remember(self) -> None:
        super().remember()
        self.kept = (self.target.state, [dict(group) for group in self.target.param_groups])

    def apply(self) -> None:
        super().apply()
        numbers = [number for group in self.state["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.target.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            loaded, same = self.target.state.get(parameter, {}), self.dtypes[number] == dtype_name(parameter.dtype)
            for key, value in self.state["state"].get(number, {}).items():
                now = loaded.get(key)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype and (same or value.numel() == 1):
                    loaded[key] = value.to(now.device)

    def undo(self) -> None:
        state, groups = self.kept
        self.target.__setstate__({"state": state, "param_groups": groups})


def containers(value: Any) -> Any:
    """A copy of lists, dicts and tuples, with the same tensors in them."""
    if isinstance(value, dict):
        return {key: containers(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(containers(entry) for entry in value)
    return value
