"""torch.compile(backend="fp8fx"): found by name, same numbers and plan as fp8fx.compile, errors that name the cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate.models import Stack
from torch import Tensor, nn

import fp8fx


def make() -> nn.Module:
    torch.manual_seed(0)
    return Stack()


def gradients(model: nn.Module, call: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    call(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_is_found_by_name() -> None:
    assert "fp8fx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_same_numbers_and_plan_as_compile(recipe: str) -> None:
    model, x = make(), torch.randn(3, 5, 8)
    fast = fp8fx.compile(model, recipe)
    expected = gradients(model, fast, x)
    compiled = torch.compile(model, backend="fp8fx", options={"recipe": recipe, "inner": "eager"}, fullgraph=True)
    got = gradients(model, compiled, x)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [(row.name, row.decision) for row in fp8fx.plan(compiled).rows] == [(r.name, r.decision) for r in fast.plan().rows]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "hybrid"}, "unknown key 'recpie'.*Did you mean 'recipe'"),
        ({"recipe": "hybird"}, "hybird.*Did you mean 'hybrid'"),
        ({"exempt": ["nothing_like_it"]}, "nothing_like_it"),
    ],
)
def test_bad_options_name_the_cause(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(make(), backend="fp8fx", options=options)
    with pytest.raises(Exception, match="(?s)" + message):
        compiled(torch.randn(3, 5, 8))
