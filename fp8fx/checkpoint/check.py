"""Does what the file holds fit what it is to be loaded into? Nothing is changed here; what does not fit is a CheckpointError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fp8fx.checkpoint.apply import Action, OptimizerAction, StatefulAction
from fp8fx.checkpoint.migrate import Difference
from fp8fx.checkpoint.parts import LOADS, Model, class_name, optimizer_groups
from fp8fx.errors import CheckpointError, nearest

SHOWN = 4


def check_model(there: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], list[Difference]]:
    """The entries to load, cast where the model's dtype changed."""
    here = model.entries()
    missing, unknown = [key for key in here if key not in there], [key for key in there if key not in here]
    if missing or unknown:
        raise CheckpointError(f"the file is of another model. {_names(missing, unknown, here)}{_wrapped(there, here)}")
    shapes = [
        f"{key!r} is {_form(there[key])} there and {_form(value)} here"
        for key, value in here.items()
        if _shape(there[key]) != _shape(value)
    ]
    if shapes:
        raise CheckpointError(f"the file is of another model: {', '.join(shapes[:SHOWN])}{_more(shapes)}")
    entries = {key: there[key].to(value.dtype) if isinstance(value, Tensor) else there[key] for key, value in here.items()}
    return entries, _dtypes(there, here)


def _names(missing: list[str], unknown: list[str], here: Mapping[str, Any]) -> str:
    said = []
    if missing:
        said.append(f"It lacks {', '.join(map(repr, missing[:SHOWN]))}{_more(missing)}.")
    if unknown:
        hint = nearest(unknown[0], missing or here)
        said.append(f"It has {', '.join(map(repr, unknown[:SHOWN]))}{_more(unknown)}, which this model has not.{hint}")
    return " ".join(said)


def _wrapped(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """A hint where one side's names are the other's behind one more prefix."""
    for one, other, whose in ((there, here, "the file's"), (here, there, "this model's")):
        first, wanted = next(iter(one), ""), next(iter(other), "")
        if wanted and first.endswith(f".{wanted}"):
            return f" All of {whose} names seem to start with {first[: -len(wanted)]!r}: pass the same model as when it was saved."
    return ""


def _dtypes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    pairs = Counter(
        (_dtype(there[key]), _dtype(value)) for key, value in here.items() if isinstance(value, Tensor) and there[key].dtype != value.dtype
    )
    lossy = "rounded" if any(_bits(old) > _bits(new) for old, new in pairs) else "exact"
    return [
        Difference(
            f"{count} of the model's tensors are {old} there and {new} here",
            f"they are cast ({lossy}), and the optimizer's state with them",
        )
        for (old, new), count in pairs.items()
    ]


def _bits(dtype: str) -> int:
    kind = getattr(torch, dtype)
    return kind.itemsize if kind.is_floating_point else 0


def _form(value: Any) -> str:
    return f"{_dtype(value)} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shape(value: Any) -> Any:
    """What must be equal; float16 may become float32, but not int64."""
    return (tuple(value.shape), value.is_floating_point()) if isinstance(value, Tensor) else type(value)


def _more(items: list[str]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""


def check_gradients(there: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Gradients by parameter, in the parameter's dtype and on its device."""
    parameters = model.parameters()
    for name, grad in there.items():
        if name not in parameters or parameters[name].shape != grad.shape:
            raise CheckpointError(f"the file has a gradient {_form(grad)} for {name!r}, which this model has no such parameter for")
    return {name: grad.to(parameters[name]) for name, grad in there.items()}


# -- the objects around ---------------------------------------------------------------------------------------------------


def check_optimizers(there: list[Any], optimizers: list[Any], model: Model) -> list[Action]:
    return [
        _optimizer(saved, optimizer, model, _which(number, optimizers))
        for number, (saved, optimizer) in enumerate(zip(there, optimizers, strict=True))
    ]


def _which(number: int, objects: list[Any]) -> str:
    return f"[{number}]" if len(objects) > 1 else ""


def _optimizer(saved: Mapping[str, Any], optimizer: Any, model: Model, which: str) -> Action:
    """Its action, with the saved state in the order of this optimizer's parameters."""
    if saved["class"] != class_name(optimizer):
        raise CheckpointError(
            f"optimizer{which} is a {saved['class']} in the file and a {class_name(optimizer)} here: their states mean different things. "
            f"Make a {saved['class']}, or leave out optimizer= to start a new one"
        )
    here, groups = optimizer_groups(optimizer, model, LOADS), saved["groups"]
    if len(here) != len(groups):
        raise CheckpointError(f"optimizer{which} has {len(groups)} parameter groups in the file and {len(here)} here: make the same groups")
    state = dict(saved["state"])
    state["param_groups"] = [
        _ordered(dict(group), there, mine, f"group {number} of optimizer{which}")
        for number, (group, there, mine) in enumerate(zip(state["param_groups"], groups, here, strict=True))
    ]
    numbers = [number for group in saved["state"]["param_groups"] for number in group["params"]]
    dtypes = [dtype for group in saved["dtypes"] for dtype in group]
    return OptimizerAction(optimizer, state, dict(zip(numbers, dtypes, strict=True)))


def _ordered(group: dict[str, Any], there: list[Any], here: list[Any], where: str) -> dict[str, Any]:
    """`group` with its parameters in the order of `here`: torch pairs them by position."""
    if there == here:
        return group
    saved = {name: number for number, (name, _) in enumerate(there)}
    lost = [name for name, _ in here if name not in saved]
    gone = [name for name in saved if name not in {name for name, _ in here}]
    if (
        lost
        or gone
        or len(saved) != len(there)
        or len(there) != len(here)
        or any(there[saved[name]] != [name, shape] for name, shape in here)
    ):
        parts = [f"{len(there)} parameters there, {len(here)} here"]
        parts += [f"{what} {names[0]!r}{_more_names(names)}" for what, names in (("only here", lost), ("only there", gone)) if names]
        raise CheckpointError(f"{where} holds other parameters in the file: {'; '.join(parts)}. Make the same groups as when it was saved")
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][saved[name]] for name, _ in here]
    return group


def _more_names(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_stateful(there: list[Any], objects: list[Any], kind: str) -> tuple[list[Action], list[Difference]]:
    """Loss scalers and schedulers: the class and the entries of the state must be those of the file."""
    actions: list[Action] = []
    differences: list[Difference] = []
    for number, (saved, target) in enumerate(zip(there, objects, strict=True)):
        name, state, here = f"{kind}{_which(number, objects)}", saved["state"], target.state_dict()
        if kind == "scaler" and bool(state) != bool(here):
            sides = (
                ("enabled there and disabled here", "its scale is dropped")
                if state
                else ("disabled there and enabled here", "it starts anew")
            )
            differences.append(Difference(f"the {name} is {sides[0]} (a recipe without loss scaling disables it)", sides[1]))
            continue
        if saved["class"] != class_name(target):
            raise CheckpointError(
                f"{name} is a {saved['class']} in the file and a {class_name(target)} here; leave out {kind}= to start a new one"
            )
        if state.keys() != here.keys():
            keys = sorted(map(str, state.keys() ^ here.keys()))
            raise CheckpointError(
                f"the state of {name} has other entries in the file: {', '.join(keys[:SHOWN])}; leave out {kind}= to start a new one"
            )
        actions.append(StatefulAction(target, state))
    return actions, differences
