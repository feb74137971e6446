"""When the weights of a compiled model are quantized: once in evaluation and for each step, and again where they changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_net import make, rows
from torch import Tensor, nn

import fp8fx
from fp8fx import state


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters whose quantization ran, in order."""
    done: list[str] = []
    real = state.quantize_weight

    def spy(weight: Tensor, wanted: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        done.append(wanted.parameter)
        return real(weight, wanted, scale)

    monkeypatch.setattr(state, "quantize_weight", spy)
    return done


WEIGHTS = ["fc1.weight", "fc2.weight", "head.weight"]


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_weights_are_quantized_once_in_evaluation(quantized: list[str], how: str) -> None:
    fast = fp8fx.compile(make())
    fast.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        first = fast(rows())
        quantized.clear()
        for _ in range(3):
            assert torch.equal(fast(rows()), first)
    assert quantized == []


def test_training_quantizes_every_time_by_default(quantized: list[str]) -> None:
    fast = fp8fx.compile(make())
    fast(rows())
    quantized.clear()
    fast(rows())
    assert sorted(quantized) == WEIGHTS


def changed(model: nn.Module, fast: nn.Module, how: str) -> None:
    """Change every weight in one of the ways users do."""
    if how in ("sgd", "foreach", "fused"):
        options: dict[str, Any] = {} if how == "sgd" else {how: True}
        kind = torch.optim.SGD if how == "sgd" else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=0.1, **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    elif how == "load_state_dict":
        fast.load_state_dict(make(3).state_dict())
    elif how == "load into the original":
        model.load_state_dict(make(3).state_dict())
    elif how == "in place":
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    elif how == "invalidate":
        for p in model.parameters():
            p.data.mul_(2)
        fp8fx.invalidate(fast)
    else:
        raise AssertionError(how)


CHANGES = ["sgd", "foreach", "fused", "load_state_dict", "load into the original", "in place", "invalidate"]


@pytest.mark.parametrize("cache", ["none", "step"])
@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_are_quantized_again(quantized: list[str], how: str, cache: str) -> None:
    model = make()
    fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": {"weight_cache": cache}})
    if cache == "none":
        fast.eval()
    before = fast(rows())
    fast(rows())
    quantized.clear()
    changed(model, fast, how)
    after = fast(rows())
    assert sorted(quantized) == WEIGHTS
    assert not torch.equal(after, before)
    assert torch.equal(after, fp8fx.compile(model)(rows()))


def test_weight_cache_step_quantizes_once_per_step(quantized: list[str]) -> None:
    model = make()
    fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": {"weight_cache": "step"}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast(rows())
    quantized.clear()
    for _ in range(2):
        for seed in range(3):  # gradient accumulation
            fast(rows(seed=seed)).square().mean().backward()
        optimizer.step()
    assert sorted(quantized) == WEIGHTS  # the first step's weights were there already
