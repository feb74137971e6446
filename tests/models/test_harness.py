"""Does the harness notice? The checks of tests/models must fail on what is only almost right."""

from __future__ import annotations

from typing import Any

import pytest
from coverage_meter import CoverageMeter
from models import measure as measuring
from models.measure import check, measure
from models.zoo import build

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
