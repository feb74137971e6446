"""Results of training runs that never ran."""

from __future__ import annotations

import math
from typing import Any

from fp8fx.demo.results import Result


def result(task: str, recipe: str, loss: float = 2.0, accuracy: float = 0.98, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "task": task,
        "metric": "loss" if task == "gpt" else "accuracy",
        "recipe": recipe,
        "seed": 0,
        "steps": 3,
        "held_out_loss": loss,
        "accuracy": accuracy,
        "seconds": 1.0,
        "diverged": "",
        "fp8_share": 0.0 if recipe == "none" else 1.0,
        "exempt_share": 0.05,
        "worst_layer": "" if recipe == "none" else "blocks.0.up",
        "worst_sqnr": math.nan if recipe == "none" else 25.0,
        "losses": [3.0, 2.5, 2.0],
        "sqnr": {},
    }
    return Result(**(values | changes))


def seeds(task: str, recipe: str, accuracies: list[float]) -> list[Result]:
    """One run per accuracy, with seeds from 0."""
    return [result(task, recipe, accuracy=accuracy, seed=seed) for seed, accuracy in enumerate(accuracies)]
