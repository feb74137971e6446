"""What both families of models are asked besides accuracy: that compiling and planning leave the model as it was."""

from __future__ import annotations

import torch
from models.measure import RECIPES
from models.zoo import build

import fp8fx


def check_untouched(name: str, recipe: str = "hybrid") -> None:
    """compile, plan and a compiled evaluation change neither tensors nor outputs nor flags of the model passed in."""
    case = build(name)
    model = case.model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kind = type(model)
    with torch.no_grad():
        before = case.logits(model)
        plan = fp8fx.plan(model, RECIPES[recipe], example_inputs=case.inputs)
        fast = fp8fx.compile(model, RECIPES[recipe])
        rounded = case.logits(fast)
        fast.train()
        after = case.logits(model)
    assert torch.equal(before, after)
    assert not torch.equal(before, rounded)
    assert type(model) is kind
    assert not model.training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [(row.name, row.decision, row.formats, row.flops) for row in plan.rows] == [
        (row.name, row.decision, row.formats, row.flops)
        for row in fast.plan().rows  # type: ignore[operator]
    ]
