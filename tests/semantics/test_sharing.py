"""One tensor or module in several places: tied weights, modules under two names, modules called twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data
from torch import Tensor, nn

import fp8fx

everywhere = pytest.mark.parametrize("entry", ENTRIES)
in_all_ways = pytest.mark.parametrize(("recipe", "entry"), WAYS)


class TiedTable(nn.Module):
    """An embedding's table is the weight of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.out = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.mid(self.embed(index)))


class TiedLayers(nn.Module):
    """Two linears of one weight with biases of their own, and its transpose in a third product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        return y @ self.first.weight


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Twice(nn.Module):
    """A block under two names, and a layer that is called twice in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Pair()
        self.again = self.block
        self.back = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.back(self.again(x)))
        return self.block(x)


def step_twice(run: Run) -> Tensors:
    """Two optimizer steps: tied tensors must stay tied."""
    index = torch.arange(20).reshape(2, 10) % 24
    x = index if isinstance(run.model, TiedTable) else run.tensor(data(2, 5, 16))
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05 / run.scale)
    found: dict[str, Tensor | None] = {}
    for step in range(2):
        optimizer.zero_grad()
        y = run(x)
        run.loss(y).backward()
        found |= {f"{step} y": y.detach(), **{f"{step} {name}": g for name, g in run.gradients().items()}}
        optimizer.step()
    return found


@in_all_ways
@pytest.mark.parametrize("make", [TiedTable, TiedLayers, Twice])
def test_gradients_of_all_uses_are_summed(make: Any, recipe: str, entry: str) -> None:
    called = check(make, step_twice, recipe, entry)
    plan = fp8fx.plan(called)
    if make is Twice:
        assert {(row.name, row.calls) for row in plan.fp8} == {
            *((f"block.{name}", 3) for name in ("up", "down")),
            ("back", 2),
        }
    if make is TiedTable:
        assert called.out.weight is called.embed.weight


@everywhere
def test_an_exempt_use_of_a_tied_weight_leaves_the_other_alone(entry: str) -> None:
    called = check(TiedTable, step_twice, "hybrid", entry, exempt=["out"])
    assert {row.name: row.decision for row in fp8fx.plan(called).rows} == {"embed": "fp8", "mid": "fp8", "out": "exempt"}


def retied(run: Run) -> Tensors:
    """Tied and untied after the first call."""
    found: dict[str, Tensor | None] = {}
    weight = run.model.second.weight
    for number, tied in enumerate((True, False, True)):
        run.model.second.weight = weight if tied else nn.Parameter(weight.detach() * 1.5)
        run.model.zero_grad()
        y = run(run.tensor(data(3, 16)))
        run.loss(y).backward()
        found |= {f"{number} y": y.detach(), **{f"{number} {name}": g for name, g in run.gradients().items()}}
    return found


@everywhere
def test_tying_after_the_first_call(entry: str) -> None:
    check(TiedLayers, retied, "hybrid", entry)


@pytest.mark.parametrize("pattern", ["block.up", "again.*up"])
def test_a_pattern_for_either_name_of_a_module_means_both(pattern: str) -> None:
    called = check(Twice, step_twice, "hybrid", "compile", exempt=[pattern])
    assert {row.name: row.decision for row in fp8fx.plan(called).rows if row.name.endswith("up")} == {"block.up": "exempt"}
