"""From the layers' effects to a recipe that meets a budget: exempt the worst until the measured loss meets it, take back what was too much.

Every step is measured on all batches, since effects do not add up. The recipe is at last run as what it is, a recipe, and that loss is
the one reported. At least one layer stays in FP8: without any, a budget would always be met.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fp8fx.errors import ModelError, PassError
from fp8fx.recipe import Recipe
from fp8fx.sensitivity.budget import Budget, increase
from fp8fx.sensitivity.study import Study, Variant


@dataclass(frozen=True)
class Suggestion:
    """A recipe that meets a budget. high, full, loss: in high precision, under the recipe given, and under this one.

    data: the recipe as it is written: what it extends, and the rules that were added. exempt: the layers they exempt. measured: how many
    choices of layers were measured to find it.
    """

    recipe: Recipe
    data: dict[str, Any]
    exempt: list[str]
    budget: Budget
    high: float
    full: float
    loss: float
    layers: int
    measured: int

    def text(self) -> str:
        """The YAML of the recipe, with what was measured as a comment."""
        head = f"# Suggested by fp8fx.sensitivity: {self}\n"
        return head + yaml.safe_dump(self.data, sort_keys=False, default_flow_style=None, width=130, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.data,
            "exempt": self.exempt,
            "budget": str(self.budget),
            "limit": self.budget.limit(self.high),
            "loss": self.loss,
            "measured": self.measured,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.exempt)} of {self.layers} layers exempt; loss {self.loss:.6g}, {increase(self.loss, self.high)} over "
            f"high precision ({self.high:.6g}); budget {self.budget}; without exemptions {self.full:.6g}, {increase(self.full, self.high)}"
        )


def suggest(study: Study, ranked: Sequence[tuple[str, float]], full: float, budget: Any) -> Suggestion:
    """ranked: the layers in FP8 with their effects, the worst first. full: the loss with all of them. See the module docstring."""
    wanted = Budget.parse(budget)
    search = _Search(study, wanted, [name for name, _ in ranked], full)
    chosen = search.run()
    effects = dict(ranked)
    data = recipe_data(study, [(name, effects[name]) for name in effects if name in chosen], wanted)
    recipe = Recipe.load(data)
    loss = study.loss(Variant(recipe=recipe)) if chosen else full
    if not wanted.met(loss, study.baseline):
        raise PassError(
            f"the suggested recipe gives a loss of {loss:.6g}, and the same choice of layers gave {search.loss:.6g} before. This is a bug "
            "in fp8fx; nothing was written."
        )
    left = study.fp8_under(recipe)
    exempt = [name for name in study.layers() if name not in left]
    return Suggestion(recipe, data, exempt, wanted, study.baseline, full, loss, len(ranked), search.measured)


class _Search:
    """`names`: the worst first. `loss` is that of the choice made last."""

    def __init__(self, study: Study, budget: Budget, names: list[str], full: float) -> None:
        self.study, self.budget, self.names = study, budget, names
        self.full = self.loss = full
        self.measured = 0

    def run(self) -> set[str]:
        """The layers to exempt. Raises ModelError if all but one are not enough."""
        count = 0
        while not self.budget.met(self.loss, self.study.baseline):
            count += 1
            if count == len(self.names):
                raise self._impossible()
            self.loss = self._measure(self.names[:count])
        return self._taken_back(set(self.names[:count]))

    def _taken_back(self, exempt: set[str]) -> set[str]:
        """Of those that were exempt, the least harmful first: back into FP8 where the budget is met all the same."""
        for name in [name for name in reversed(self.names) if name in exempt][1:]:  # the last one was needed: it made the difference
            loss = self._measure(exempt - {name})
            if self.budget.met(loss, self.study.baseline):
                exempt, self.loss = exempt - {name}, loss
        return exempt

    def _measure(self, exempt: Collection[str]) -> float:
        self.measured += 1
        return self.study.loss(Variant(kept=frozenset(self.names) - frozenset(exempt)))

    def _impossible(self) -> ModelError:
        high, last = self.study.baseline, self.names[-1]
        return ModelError(
            f"budget {self.budget} cannot be met with any layer in FP8: the loss is {high:.6g} in high precision, so at most "
            f"{self.budget.limit(high):.6g} is allowed; it is {self.full:.6g} with all {len(self.names)} layers in FP8 "
            f"({increase(self.full, high)}), and still {self.loss:.6g} ({increase(self.loss, high)}) with {last!r} alone, the layer that "
            "adds least. Give a larger budget, more batches, or another recipe: finer scales (rowwise, blockwise), wider formats"
        )


def recipe_data(study: Study, exempt: Sequence[tuple[str, float]], budget: Budget) -> dict[str, Any]:
    """The given recipe and one rule per exempt layer. A shipped recipe is extended; of any other every key is written out."""
    given = study.recipe
    shipped = given.name in Recipe.shipped() and given == Recipe.load(given.name)
    data: dict[str, Any] = {"version": 1, "extends": given.name} if shipped else given.to_dict()
    rules = [
        {
            "match": pattern(name, study.layers()),
            "mode": "exempt",
            "reason": f"sensitivity: alone in FP8 it adds {effect:.3g} to a loss of {study.baseline:.4g}; budget {budget}",
        }
        for name, effect in exempt
    ]
    if rules:
        data["rules"] = [*data.get("rules", []), *rules]
    return data


def pattern(name: str, layers: Collection[str]) -> str:
    """What matches this layer and no other: its name, or an exact regular expression where a bare name would match more."""
    container = any(other.startswith(f"{name}.") for other in layers)
    return f"re:{re.escape(name)}" if container or re.search(r"[*?\[]", name) or name.startswith("re:") else name
