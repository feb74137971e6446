"""What one training run gave, and a recipe's runs taken together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BASELINE = "none"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training run. `fp8_share` is of non-exempt FLOPs, `exempt_share` of all FLOPs; SQNR in dB."""

    task: str
    metric: str
    recipe: str
    seed: int
    steps: int
    held_out_loss: float
    accuracy: float
    seconds: float
    diverged: str
    fp8_share: float
    exempt_share: float
    worst_layer: str
    worst_sqnr: float
    losses: list[float]
    sqnr: dict[str, float]


def of(results: Iterable[Result], task: str, recipe: str) -> list[Result]:
    """The runs of `task` under `recipe`, one per seed."""
    return [r for r in results if (r.task, r.recipe) == (task, recipe)]


def rows(results: list[Result]) -> list[list[Result]]:
    """The runs grouped by task and recipe, in the order in which they came."""
    return [of(results, task, recipe) for task, recipe in dict.fromkeys((r.task, r.recipe) for r in results)]
