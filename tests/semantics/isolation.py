"""What test_isolation.py runs in one process for several models, and alone in a process of its own for each.

python -m semantics.isolation <seed> <file>      writes what the model of that seed gives under every recipe and entry, alone
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from semantics.harness import ENTRIES, STATEFUL, data, enter, seeded
from semantics.models import Mlp
from torch import Tensor

STEPS = 3
SCALE = 2.0**10  # of the loss: gradients of `direct` have no scale of their own


def build(recipe: str, entry: str, seed: int) -> Any:
    return enter(seeded(Mlp, seed), STATEFUL[recipe], entry)


def weights(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}


def training(model: Any, seed: int, steps: int = STEPS) -> Iterator[None]:
    """Training that stops after every half of a step, so that another's can go on in between."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / SCALE)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            loss = model(data(4, 16, seed=100 * seed + 10 * step + micro)).square().mean() * SCALE
            yield
            loss.backward()
            yield
        optimizer.step()


def finish(*runs: Iterator[None]) -> None:
    """The runs in turns."""
    left = list(runs)
    while left:
        left = [run for run in left if next(run, "over") is None]


def in_flight(model: Any, seed: int) -> Iterator[None]:
    """Two forwards, then their backwards, the second first."""
    losses = [model(data(4, 16, seed=100 * seed + n)).square().mean() * SCALE for n in range(2)]
    yield
    for loss in reversed(losses):
        loss.backward()
        yield


def alone(recipe: str, entry: str, seed: int) -> dict[str, dict[str, Tensor]]:
    """Each scenario with the model of `seed` only. Of a model and its copy, the one that `seed` stands for goes on."""
    trained = build(recipe, entry, seed)
    finish(training(trained, seed))
    first = build(recipe, entry, seed=1)
    finish(training(first, 9, steps=1))
    copied = copy.deepcopy(first)
    goes_on = first if seed == 1 else copied
    finish(training(goes_on, seed))
    sequential = build(recipe, entry, seed)
    for n in range(2):
        (sequential(data(4, 16, seed=100 * seed + n)).square().mean() * SCALE).backward()
    return {"trained": weights(trained), "copied": weights(goes_on), "in flight": gradients(sequential)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums are split by threads, and their last bits with them
    found = {}
    for recipe in STATEFUL:
        for entry in ENTRIES:
            torch._dynamo.reset()
            found[f"{recipe}/{entry}"] = alone(recipe, entry, int(sys.argv[1]))
    torch.save(found, sys.argv[2])
