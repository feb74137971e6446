"""Activation checkpointing against the oracle of the same model without it (tests/test_checkpoint.py has what is particular)."""

from __future__ import annotations

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data
from semantics.models import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8fx


class Stack(nn.Module):
    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Attention(), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.out(x)


class Recomputed(Stack):
    reentrant = False


class Reentrant(Stack):
    reentrant = True


def accumulates(run: Run) -> Tensors:
    """Two micro-batches in flight at once, then one more."""
    x = run.tensor(data(2, 5, 16).requires_grad_())
    first, second = run(x), run(x * 0.5)
    (run.loss(second) + run.loss(first)).backward()
    third = run(x + 1)
    run.loss(third).backward()
    return {"first": first.detach(), "second": second.detach(), "third": third.detach(), "x": x.grad, **run.gradients()}


@pytest.mark.parametrize(("recipe", "entry"), WAYS)
@pytest.mark.parametrize("make", [Recomputed, Reentrant])
def test_inside_the_model(make: type[nn.Module], recipe: str, entry: str) -> None:
    check(make, accumulates, recipe, entry, oracle_of=Stack)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_around_the_compiled_model(entry: str, reentrant: bool) -> None:
    """`checkpoint(fast, x)`: the recomputation is a call of its own, and rounds to nearest as the first did."""

    def body(run: Run) -> Tensors:
        x = run.tensor(data(2, 5, 16).requires_grad_())
        y = checkpoint(run, x, use_reentrant=reentrant) if run.around is None else run(x)
        run.loss(y).backward()
        return {"y": y.detach(), "x": x.grad, **run.gradients()}

    check(Stack, body, "hybrid", entry)


def test_rounds_recomputed_values_to_the_same_codes() -> None:
    """The recomputed forward saves what the first would have: bit for bit, so gradients are equal to those without checkpointing."""
    found = []
    for make in (Stack, Recomputed, Reentrant):
        torch.manual_seed(0)
        fast = fp8fx.compile(make(), "rowwise")
        fast(data(2, 5, 16).requires_grad_()).square().mean().backward()
        found.append([p.grad.clone() for p in fast.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(fast.parameters()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
