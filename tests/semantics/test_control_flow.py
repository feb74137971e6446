"""Python that depends on data: graphs break, every branch keeps its meaning, and what lies outside of graphs is in the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data, enter, seeded
from torch import Tensor, nn

import fp8fx


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.left, self.right, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.seen: list[float] = []


class Branches(Layers):
    """The branch depends on the values of an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = torch.tanh(self.left(x)) if x.sum() > 0 else self.right(x) * 2
        return self.out(x)


class Counts(Layers):
    """A number read from a tensor decides how often a layer runs, and is kept in a list."""

    def forward(self, x: Tensor) -> Tensor:
        times = int(x[0, 0].abs().item() * 10) % 3 + 1
        self.seen.append(times)
        x = self.inp(x)
        for _ in range(times):
            x = torch.tanh(self.left(x))
        return self.out(x)


class Ragged(Layers):
    """A shape that depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        kept = x[x[:, 0] > 0]
        return self.out(self.left(kept)).sum(0) / 16 + self.right(x).mean()


class Bypasses(Layers):
    """A layer runs where Dynamo does not look."""

    @torch._dynamo.disable
    def aside(self, x: Tensor) -> Tensor:
        return self.left(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.right(self.aside(self.inp(x))))


def both_signs(run: Run) -> Tensors:
    found: dict[str, Tensor | None] = {}
    base = data(5, 16)
    for number, x in enumerate((base, -base, base * 0.3, -base * 0.3, base[:3])):
        run.model.zero_grad()
        y = run(run.tensor(x))
        run.loss(y).backward()
        found |= {f"{number} y": y.detach(), **{f"{number} {name}": g for name, g in run.gradients().items()}}
    return found


@pytest.mark.parametrize(("recipe", "entry"), WAYS)
@pytest.mark.parametrize("make", [Branches, Counts, Ragged, Bypasses])
def test_broken_graphs_keep_their_meaning(make: type[Layers], recipe: str, entry: str) -> None:
    called = check(make, both_signs, recipe, entry)
    decisions = {row.name: row.decision for row in fp8fx.plan(called).rows}
    outside = {Bypasses: {"left"}, Counts: {"right"}}.get(make, set())  # Counts never calls it
    assert decisions == {name: "not_captured" if name in outside else "fp8" for name in ("inp", "left", "right", "out")}
    row = next((row for row in fp8fx.plan(called).rows if row.decision == "not_captured"), None)
    assert row is None or "outside every captured graph" in row.reason


def test_side_effects_happen_once_per_call() -> None:
    fast, plain = enter(seeded(Counts)), seeded(Counts)
    for seed in range(4):
        x = data(3, 16, seed=seed)
        fast(x)
        plain(x)
    assert fast.seen == plain.seen
    assert fp8fx.unwrap(fast).seen == []  # the clone's list is its own


@pytest.mark.parametrize(
    ("make", "cause"), [(Branches, "Data-dependent"), (Counts, "item|Data-dependent|data-dependent"), (Bypasses, "disable")]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_fullgraph_names_what_breaks(make: type[Layers], cause: str, entry: str) -> None:
    called: Any = enter(seeded(make), entry=entry, fullgraph=True)
    with pytest.raises(Exception, match=f"(?s){cause}") as caught:
        called(data(5, 16))
    assert isinstance(caught.value, fp8fx.CaptureError) == (entry == "compile")
    assert __file__.rsplit("/", 1)[-1] in str(caught.value), "the message does not say where"
