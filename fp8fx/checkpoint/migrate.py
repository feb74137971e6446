"""What changed between a checkpoint and the model that loads it, and the stated rule for each: docs/checkpoints.md has the table.

Every change is a Difference: what differs, and what loading it with `migrate=True` does about it. Without migrate they are all refused at
once. amax is measured on tensors in high precision, so a history means the same under any format: scales can be made anew from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8fx.entries import unmatched
from fp8fx.errors import FP8Error, ModelError
from fp8fx.numerics.delayed import delayed_scale
from fp8fx.runtime import Runtime
from fp8fx.scaling import DUE, is_scaling, meaning_of, with_meaning

SHOWN = 4  # keys of a recipe that a message lists


@dataclass(frozen=True)
class Difference:
    what: str
    rule: str

    def __str__(self) -> str:
        return f"{self.what}: {self.rule}"


@dataclass
class FP8Plan:
    """What one compiled part will take, and whether scales of another format are to be converted as its graphs ask for them."""

    state: dict[str, Tensor]
    convert: bool


def plan_part(
    prefix: str, runtime: Runtime, saved: Mapping[str, Any] | None, state: dict[str, Tensor], modules: set[str]
) -> tuple[FP8Plan, list[Difference]]:
    """For the part of the model at `prefix`. saved: {"name": ..., "recipe": ...} of the checkpoint, None if it has no such part."""
    if saved is None:
        what = f"the checkpoint has no FP8 state for {prefix.removesuffix('.') or 'the whole model'!r}, which was not compiled there"
        return FP8Plan({}, False), [Difference(what, "it keeps the state it has")]
    found = _recipe(runtime, saved)
    state, scaling = _scaling(runtime, state)
    state = _seed(runtime, saved, state)
    convert = bool(found)
    missing, unknown = unmatched(state, modules)
    if missing or unknown:
        found.append(Difference(_unmatched(missing, unknown), "unknown entries are dropped, missing ones start anew"))
        state = {key: value for key, value in state.items() if key not in unknown}
    try:
        runtime.check_state(state)
    except ModelError as error:  # with the same recipe: this fp8fx decides formats otherwise, or the model's graphs differ
        runtime.check_state(state, convert=True)
        convert = True
        if not found:
            found.append(Difference(_problem(error), "scales are made anew from the history of amax"))
    return FP8Plan(state, convert), found + scaling


def _problem(error: FP8Error) -> str:
    return str(error).removeprefix("this state is of another recipe: ").partition(". Load the weights alone")[0]


def _unmatched(missing: list[str], unknown: list[str]) -> str:
    sides = [("lacks", missing), ("has entries this model cannot have:", unknown)]
    return "the FP8 state " + " and ".join(
        f"{verb} {', '.join(map(repr, keys[:3]))}{' ...' * (len(keys) > 3)}" for verb, keys in sides if keys
    )


# -- the recipe -----------------------------------------------------------------------------------------------------------


def _recipe(runtime: Runtime, saved: Mapping[str, Any]) -> list[Difference]:
    there, here = _flat(saved["recipe"]), _flat(runtime.recipe.to_dict())
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if not keys:
        return []
    shown = ", ".join(f"{key} {_word(there, key)} -> {_word(here, key)}" for key in keys[:SHOWN])
    more = f" and {len(keys) - SHOWN} more keys" if len(keys) > SHOWN else ""
    names = f"the recipe is {saved['name']!r} there and {runtime.recipe.name!r} here"
    return [
        Difference(
            f"{names}: {shown}{more}",
            "the run goes on under the model's recipe; a scale whose format changed is made anew from its history",
        )
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted keys. Lists stay whole: rules are ordered, and one more shifts the others."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: entry for name, inner in value.items() for key, entry in _flat(inner, f"{path}.{name}".lstrip(".")).items()}


def _word(flat: Mapping[str, Any], key: str) -> str:
    text = "absent" if key not in flat else str(flat[key])
    return text if len(text) <= 40 else f"{text[:37]}..."


def _seed(runtime: Runtime, saved: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A seed that the recipe changed is meant; step and call go on."""
    if saved["recipe"].get("seed") == runtime.recipe.seed or "stream" not in state:
        return state
    stream = state["stream"].clone()
    stream[0] = runtime.recipe.seed
    return {**state, "stream": stream}


# -- delayed scales -------------------------------------------------------------------------------------------------------


def _scaling(runtime: Runtime, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Difference]]:
    """The state as the model's recipe keeps it, and what that changed besides the recipe itself."""
    kept = {key: value for key, value in state.items() if is_scaling(key)}
    rest = {key: value for key, value in state.items() if key not in kept}
    rule = runtime.recipe.delayed.model_dump()
    if bool(kept) == runtime.recipe.keeps_scales and (not kept or meaning_of(kept).get("rule") == rule):
        return state, []
    if not runtime.recipe.keeps_scales:
        return rest, [Difference("the checkpoint has delayed scales and this recipe keeps none", "they are dropped")]
    if not kept:
        fresh = with_meaning({"rule": rule, "formats": {}}) | {DUE: torch.tensor(False)}
        return rest | fresh, [Difference("the checkpoint has no delayed scales and this recipe keeps them", _ANEW)]
    return rest | _remade(kept, rule), [Difference(f"the rule of delayed scales, {_rules(meaning_of(kept)['rule'], rule)}", _RULE)]


_ANEW = "they start anew, at 1: run one batch under fp8fx.autocast(calibrating=True) before the next step"
_RULE = "histories keep their newest entries; scales are made anew where algorithm or margin changed"


def _rules(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in here if there.get(key) != here[key])


def _remade(kept: dict[str, Tensor], rule: Mapping[str, Any]) -> dict[str, Tensor]:
    meaning = meaning_of(kept)
    renew = any(meaning["rule"].get(key) != rule[key] for key in ("algorithm", "margin"))
    made = kept | with_meaning({"rule": rule, "formats": meaning["formats"]})
    for name, (format, power_of_two) in meaning["formats"].items():
        history = kept.get(f"{name}.history")
        if history is None:
            continue
        made[f"{name}.history"] = history = resized(history, rule["history"])
        if renew and f"{name}.scale" in kept:
            scale = kept[f"{name}.scale"]
            made[f"{name}.scale"] = delayed_scale(history, scale, format, rule["algorithm"], rule["margin"], power_of_two)
    return made


def resized(history: Tensor, length: int) -> Tensor:
    """[length], the newest entries first: the oldest leave, or zeros (nothing measured) follow."""
    kept = history[:length]
    return torch.cat([kept, kept.new_zeros(length - len(kept))])
