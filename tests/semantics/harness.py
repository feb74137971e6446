"""One question for every file of this folder: does a compiled model mean what the plain one means, with its sites rounded?

    def accumulates(run: Run) -> Tensors:        # what a user would write, on a model that may be any of three
        for x in batches:
            run.loss(run(run.tensor(x))).backward()
        return run.gradients()

    check(make, accumulates, "hybrid", "backend")

The same body runs on three models that `make` builds from one seed: in float64 without rounding, in float32 under the oracle
(tests/oracle.py), and compiled by fp8fx. Every tensor it returns must be as close to the first as the oracle's is (0.5 dB), and equal
to the oracle's but for float32's own rounding. A layer that is left out, rounded twice, or summed in another order of rounding is off
by 20 to 40 dB there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from models.measure import RECIPES as MEASURED
from oracle import Oracle, margin, sqnr
from torch import Tensor, nn

import fp8fx

Tensors = Mapping[str, Tensor | None]
TOLERANCE = 0.5  # dB, of the distance to the float64 model
AGREEMENT = 70.0  # dB, between compiled model and oracle: the same codes everywhere

# Recipes with one right answer: the oracle's. A recipe that keeps state over steps belongs here too once the oracle knows it.
RECIPES: dict[str, Any] = {**MEASURED, "rowwise": "rowwise"}
# Recipes that carry state from call to call: what must not cross between models is compared with separate processes.
STATEFUL: dict[str, Any] = {
    "direct": "direct",
    "delayed": "delayed",
    "stochastic forward": {"extends": "hybrid", "defaults": {"rounding": "stochastic"}},
}
ENTRIES = ("compile", "backend")
# Every recipe through the front door, and every entry; not each with each.
WAYS = [*((recipe, "compile") for recipe in RECIPES), ("hybrid", "backend")]


def enter(model: nn.Module, recipe: Any = "hybrid", entry: str = "compile", **options: Any) -> Any:
    """The model to call: fp8fx's clone, or torch.compile's wrapper around the model itself."""
    if entry == "compile":
        return fp8fx.compile(model, recipe, **options)
    inner = {"inner": options.pop("inner", "eager")}
    ours = {key: options.pop(key) for key in ("exempt", "output_fused") if key in options}
    return torch.compile(model, backend="fp8fx", options={"recipe": recipe, **inner, **ours}, **options)


@dataclass
class Run:
    """One of the three ways to run a model. `model` has the parameters, hooks and flags; call the Run to run it forward."""

    model: Any
    call: Callable[..., Any]
    dtype: torch.dtype
    around: Oracle | None = None  # must be open where the model runs
    scale: float = 1.0  # of the loss, where a recipe's gradients have no scale of their own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.around or contextlib.nullcontext():
            return self.call(*args, **kwargs)

    def tensor(self, x: Tensor) -> Tensor:
        """A leaf of its own with the values of `x`, in the dtype of this run."""
        return x.detach().to(self.dtype if x.is_floating_point() else x.dtype).clone().requires_grad_(x.requires_grad)

    def loss(self, y: Tensor) -> Tensor:
        return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean() * self.scale

    def copied(self, by: Callable[[Any], Any]) -> Run:
        """This run on what `by` makes of the model that is called (copy.deepcopy, pickle)."""
        if self.around is not None:
            model = by(self.model)
            oracle = Oracle(model, dtype=None)
            oracle.method, oracle.rows = self.around.method, self.around.rows
            return Run(model, model, self.dtype, oracle, self.scale)
        called = by(self.call)
        return Run(getattr(called, "_orig_mod", called), called, self.dtype, None, self.scale)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(
    make: Callable[[], nn.Module],
    body: Callable[[Run], Tensors],
    recipe: str = "hybrid",
    entry: str = "compile",
    *,
    oracle_of: Callable[[], nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
    agreement: float = AGREEMENT,
    **options: Any,
) -> Any:
    """Run `body` three ways and compare every tensor it returns; gives what `enter` made, to be looked at further.

    oracle_of: makes a model of the same meaning for the oracle and the float64 run, where the model's own control flow gets in
    their way (checkpointing recomputes outside of them).
    """
    scale = 2.0**10 if recipe == "direct" else 1.0
    model = seeded(make).to(dtype)
    called = enter(model, RECIPES[recipe], entry, **options)
    fast = body(Run(called if entry == "compile" else model, called, dtype, None, scale))
    plain = seeded(oracle_of or make).to(torch.float64)
    exact = body(Run(plain, plain, torch.float64, None, scale))
    twin = seeded(oracle_of or make).to(dtype)
    rounded = body(Run(twin, twin, dtype, Oracle(twin, RECIPES[recipe], fp8fx.plan(called), dtype=None), scale))
    compare(exact, rounded, fast, agreement)
    return called


def compare(exact: Tensors, rounded: Tensors, fast: Tensors, agreement: float = AGREEMENT) -> None:
    """Of equal names, present or absent alike, each within TOLERANCE of the oracle's distance and close to the oracle itself."""
    assert list(exact) == list(rounded) == list(fast)
    assert exact, "nothing to compare"
    problems = []
    moved = False
    for name, wanted in exact.items():
        by_oracle, ours = rounded[name], fast[name]
        assert (wanted is None) == (by_oracle is None) == (ours is None), name
        if wanted is None or by_oracle is None or ours is None:
            continue
        if not wanted.is_floating_point():
            assert torch.equal(by_oracle, ours), name
            continue
        assert wanted.shape == ours.shape, name
        assert ours.isfinite().all(), name
        moved |= sqnr(wanted, by_oracle) < 60
        found = (margin(sqnr(wanted, ours), sqnr(wanted, by_oracle)), sqnr(by_oracle, ours))
        if not (found[0] >= -TOLERANCE and found[1] >= agreement):
            problems.append((name, *found))
    assert problems == []
    assert moved, "rounding moved nothing: neither model ran in FP8"
