"""The bar: the planted outlier layer is found in 10 of 10 random models, and the suggested recipe, as a file, meets its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sensitivity.planted import planted
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx

SEEDS = range(10)


def mean_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_layer_is_found_and_the_suggestion_meets_its_budget(seed: int, tmp_path: Path) -> None:
    case = planted(seed)
    result = fp8fx.sensitivity(case.model, case.batches, case.recipe, loss=case.loss, gradients=False, switch_off=False)
    assert result.worst.name == case.layer, case.about
    second = result.ranking[1]
    assert result.effect(result.worst) > 5 * result.effect(second)
    # The SQNR need not say it, since an outlier is most of the signal; what is k times smaller is gone.
    assert max(role.underflow for role in result.worst.roles) > 0.3

    budget = 0.25 * (result.full - result.high)
    result.suggest(budget)
    result.save_suggestion(tmp_path / "suggested.yaml")
    assert result.suggestion is not None
    assert case.layer in result.suggestion.exempt
    loss = measured(case.model, tmp_path / "suggested.yaml", case)
    assert loss <= result.high + budget
    assert loss == pytest.approx(result.suggestion.loss, rel=1e-6)


@torch.no_grad()
def measured(model: nn.Module, recipe: Any, case: Any) -> float:
    """The loss under a recipe file, as any user would measure it."""
    fast = fp8fx.compile(model, recipe).eval()
    return sum((case.loss or mean_square)(fast, batch).item() for batch in case.batches) / len(case.batches)
