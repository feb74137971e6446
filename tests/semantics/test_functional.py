"""Weights that are not, or not only, the module's own Parameters: functional_call, parametrizations; and torch.autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data
from semantics.models import Attention, Mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fp8fx

everywhere = pytest.mark.parametrize("entry", ENTRIES)
in_all_ways = pytest.mark.parametrize(("recipe", "entry"), WAYS)


def step(run: Run, seed: int = 1) -> dict[str, Tensor | None]:
    run.model.zero_grad()
    x = run.tensor(data(4, 16, seed=seed).requires_grad_())
    y = run(x)
    run.loss(y).backward()
    return {"y": y.detach(), "x": x.grad, **run.gradients()}


def numbered(*steps: Tensors) -> Tensors:
    return {f"{n} {name}": value for n, tensors in enumerate(steps) for name, value in tensors.items()}


# -- torch.func.functional_call -------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Calls what it holds with parameters from outside, so that the outermost module is a module for torch.compile too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self.net, weights, (x,))


def other_weights(run: Run, of: nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: (p.detach() * factor).requires_grad_() for name, p in of.named_parameters()}


def calls_around(run: Run) -> Tensors:
    """Around the compiled model: other tensors, then its own, then some of each, then other tensors without gradients."""
    found: dict[str, Tensor | None] = {}
    model = run.call if isinstance(run.call, nn.Module) else run.model
    prefix = "_orig_mod." if isinstance(model, torch._dynamo.OptimizedModule) else ""
    for number, keep in enumerate((lambda name: False, lambda name: True, lambda name: "up" in name)):
        weights = {name: w for name, w in other_weights(run, run.model, 1.5).items() if not keep(name)}
        run.model.zero_grad()
        given = {prefix + name: w for name, w in weights.items()}
        before, run.call = run.call, lambda x, given=given: torch.func.functional_call(model, given, (x,))
        y = run(run.tensor(data(4, 16)))
        run.call = before
        run.loss(y).backward()
        found |= {f"{number} y": y.detach(), **{f"{number} {name}": w.grad for name, w in weights.items()}}
        found |= {f"{number} own {name}": g for name, g in run.gradients().items()}
        assert all(w.grad is not None for w in weights.values())
    return found


@everywhere
def test_functional_call_of_the_compiled_model(entry: str) -> None:
    check(Mlp, calls_around, "hybrid", entry)


def calls_inside(run: Run) -> Tensors:
    weights = other_weights(run, run.model.net, 0.75)
    y = run(run.tensor(data(4, 16)), weights)
    run.loss(y).backward()
    return {"y": y.detach(), **{name: w.grad for name, w in weights.items()}}


@in_all_ways
def test_functional_call_inside_the_compiled_model(recipe: str, entry: str) -> None:
    called = check(Functional, calls_inside, recipe, entry)
    assert [row.name for row in fp8fx.plan(called).fp8] == ["net.inp", "net.up", "net.down", "net.head"]


# -- parametrizations -----------------------------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.up)


def spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(model.up, n_power_iterations=3)


def doubled(model: Any) -> None:
    parametrize.register_parametrization(model.up, "weight", Double())
    parametrize.register_parametrization(model.head, "bias", Double())


TIMES = [
    ("before compile", "compile"),
    ("after compile", "compile"),
    ("after the first call", "compile"),
    ("after the first call", "backend"),
]


@pytest.mark.parametrize(("when", "entry"), TIMES)
@pytest.mark.parametrize("register", [weight_norm, spectral_norm, doubled])
def test_parametrizations(register: Callable[[Any], None], when: str, entry: str) -> None:
    def make() -> nn.Module:
        model = Mlp()
        if when == "before compile":
            register(model)
        return model

    def body(run: Run) -> Tensors:
        steps = []
        if when == "after the first call":
            steps.append(step(run))
        if when != "before compile":
            with torch.random.fork_rng():
                torch.manual_seed(5)  # spectral_norm starts from random vectors
                register(run.model)
        if register is spectral_norm:  # the same start in every dtype
            for name, buffer in run.model.named_buffers():
                start = data(*buffer.shape, seed=len(name)).to(buffer.dtype)
                buffer.copy_(start / start.norm())
        steps += [step(run, seed=seed) for seed in (1, 2)]
        run.model.eval()
        with torch.no_grad():
            steps.append({"eval": run(run.tensor(data(4, 16))).clone()})
        steps[-1] |= {name: b.clone() for name, b in run.model.named_buffers()}
        return numbered(*steps)

    called = check(make, body, "hybrid", entry)
    assert fp8fx.plan(called)["up"].decision == "fp8"


@everywhere
def test_removed_parametrizations(entry: str) -> None:
    def make() -> nn.Module:
        model = Mlp()
        doubled(model)
        return model

    def body(run: Run) -> Tensors:
        first = step(run)
        parametrize.remove_parametrizations(run.model.up, "weight")
        return numbered(first, step(run))

    check(make, body, "hybrid", entry)


@everywhere
def test_cached_parametrization(entry: str) -> None:
    """parametrize.cached(): the weight is computed once for two calls, and its gradient is that of both."""

    def body(run: Run) -> Tensors:
        weight_norm(run.model)
        with parametrize.cached():
            first, second = run(run.tensor(data(4, 16))), run(run.tensor(data(4, 16, seed=2)))
        run.loss(first + second).backward()
        return {"first": first.detach(), "second": second.detach(), **run.gradients()}

    check(Mlp, body, "hybrid", entry)


# -- autocast -------------------------------------------------------------------------------------------------------------


class Casts(Mlp):
    """Autocast inside the forward; the head runs outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.inp(x)
            x = x + self.feed(self.norm(x))
            with torch.autocast("cpu", enabled=False):
                x = x.float() if x.dtype is torch.bfloat16 else x
        return self.head(x)


def under_autocast(run: Run) -> Tensors:
    def once() -> dict[str, Tensor | None]:
        run.model.zero_grad()
        x = run.tensor(data(4, 6, 16).requires_grad_())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.dtype is not torch.float64):
            y = run(x)
        assert run.dtype is torch.float64 or y.dtype is torch.bfloat16
        run.loss(y).backward()
        return {"y": y.detach(), "x": x.grad, **run.gradients()}

    without = step(run)
    return numbered(once(), without, once(), step(run))


@in_all_ways
def test_autocast_around(recipe: str, entry: str) -> None:
    """The distance to the oracle is that of sums in bfloat16, of which one step is 48 dB."""
    check(Attention, under_autocast, recipe, entry, agreement=40.0)


@everywhere
def test_autocast_inside(entry: str) -> None:
    called = check(Casts, lambda run: numbered(step(run), step(run, seed=2)), "hybrid", entry, agreement=40.0)
    assert len(fp8fx.plan(called).fp8) == 4
    assert called(data(4, 16)).dtype is torch.float32
