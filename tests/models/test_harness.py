"""Does the harness notice? The checks of tests/models must fail on what is only almost right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coverage_meter import CoverageMeter, plain_flops
from models import measure as measuring
from models.measure import Seed, check, measure, too_far
from models.zoo import build
from oracle import Gradient
from passes.models import Experts, tokens

import fp8fx

NAME = "bert-eager"


@pytest.mark.parametrize(
    "defaults",
    [
        {"input": {"rounding": "toward_zero"}},
        {"grad_output": {"rounding": "toward_zero"}},
        {"gemms": {"grad_weight": "high_precision"}},
    ],
    ids=str,
)
def test_another_recipe_than_the_oracles_is_noticed(defaults: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measuring.RECIPES, "hybrid", {"extends": "hybrid", "defaults": defaults})
    with pytest.raises(AssertionError):
        check(measure(NAME, "hybrid", seeds=[0]))


@pytest.mark.parametrize(
    ("margins", "wrong"),
    [
        ([-0.63, 0.0, -0.3], False),  # pvt_v2_b0 on one processor
        ([-0.51], True),
        ([-0.6, -0.6, -0.4], True),  # the mean
        ([-1.01, 0.3, 0.3], True),  # one seed, whatever the others do
        ([-1.0, 0.0, 0.0], False),
        ([0.0, float("nan"), 0.0], True),
    ],
)
def test_a_gradient_is_judged_by_its_mean_and_by_its_worst_seed(margins: list[float], wrong: bool) -> None:
    seeds = [Seed(20.0, 20.0, 100.0, [Gradient(name, 20.0 + m, 20.0, 50.0, True) for name, m in (("w", m), ("b", 0.0))]) for m in margins]
    assert too_far(seeds) == ({"w": pytest.approx(margins, nan_ok=True)} if wrong else {})


def test_coverage_sees_a_gemm_in_high_precision() -> None:
    rule = {"match": "bert.encoder.layer.0.*", "gemms": {"output": "high_precision"}}
    case = build(NAME)
    fast = fp8fx.compile(case.model, {"extends": "hybrid", "rules": [rule]})
    case.logits(fast)
    with CoverageMeter() as meter:
        loss = case.loss(case.logits(fast))
    meter.run_backward(loss)
    plan = fast.plan()  # type: ignore[operator]
    inside = sum(row.flops for row in plan.rows if row.name.startswith("bert.encoder.layer.0."))
    assert meter.forward.flops["", ""] == inside > 0
    assert meter.share(plan) == pytest.approx(plan.fp8_flops_share)
    assert meter.backward.flops["", ""] == 0


@pytest.mark.parametrize("of_torch", [True, False])
def test_flops_of_experts_are_those_of_their_tokens(of_torch: bool) -> None:
    """Forward and two gradients, of torch's grouped product and of the operator that transformers has for other dtypes."""
    model = Experts(torch._grouped_mm if of_torch else None)
    x, ends = tokens(2, 2, 6)
    x.requires_grad_()
    assert plain_flops(lambda: model(x, ends).square().sum().backward()) == 3 * 2 * 6 * 16 * 8
    with torch.no_grad():
        assert plain_flops(lambda: model(x, torch.tensor([1, 2, 3], dtype=torch.int32))) == 2 * 3 * 16 * 8
