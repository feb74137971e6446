"""`fp8fx.GradScaler`, and the warning of gradients that underflow."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from compiled_net import make, rows
from torch import nn

import fp8fx

# -- loss scaling ---------------------------------------------------------------------------------------------------------


def train(recipe: Any, scaler: fp8fx.GradScaler, steps: int, seed: int = 0, loss_factor: float = 1.0) -> list[float]:
    fast = fp8fx.compile(make(seed), recipe)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = fast(rows(32)).square().mean() * loss_factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def test_scaler_is_a_pass_through_where_the_recipe_scales_gradients() -> None:
    scaler = fp8fx.GradScaler("hybrid")
    assert not scaler.is_enabled()
    loss = torch.ones((), requires_grad=True)
    assert scaler.scale(loss) is loss
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})
    losses = train("hybrid", scaler, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_scaler_has_the_recipe_s_settings(device: str | None) -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 1024, "growth_interval": 4, "growth_factor": 4}}
    scaler = fp8fx.GradScaler(recipe, device)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert (scaler.get_scale(), scaler.get_growth_interval(), scaler.get_growth_factor()) == (1024.0, 4, 4.0)
    assert fp8fx.GradScaler(recipe, "cpu", init_scale=2.0, growth_interval=7).get_growth_interval() == 7
    losses = train(recipe, scaler, 9)
    assert scaler.get_scale() == 1024.0 * 4 * 4
    assert losses[-1] < losses[0]


def test_scaler_backs_off_at_overflow_and_skips_the_step() -> None:
    """Gradients of `direct` overflow to inf, so that a scale which is too large shrinks until training goes on."""
    scaler = fp8fx.GradScaler({"extends": "direct", "loss_scaling": {"init": 2.0**40}}, "cpu")
    losses = train({"extends": "direct"}, scaler, 40)
    assert losses[0] == losses[1]  # the first step was skipped
    assert scaler.get_scale() < 2.0**30
    assert losses[-1] < losses[0]


def test_minimum_schedule() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 16, "minimum": {0: 32, 2: 64, 4: 256}}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    scales = [scaler.get_scale()]
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for _ in range(5):  # every step overflows, so that the scale would halve
        parameter.grad = torch.tensor([float("inf")])
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [32.0, 32.0, 64.0, 64.0, 256.0, 256.0]


def test_static_scaling_never_moves() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"mode": "static", "init": 4096, "growth_interval": 1}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    train(recipe, scaler, 4)
    assert scaler.get_scale() == 4096.0
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([float("inf")])
    scaler.step(torch.optim.SGD([parameter], lr=1.0))
    scaler.update()
    assert scaler.get_scale() == 4096.0
    assert parameter.item() == 1.0


def test_scaler_state_round_trip() -> None:
    recipe = {"extends": "direct", "loss_scaling": {"init": 64, "growth_interval": 2, "minimum": {3: 4096}}}
    scaler = fp8fx.GradScaler(recipe, "cpu")
    train(recipe, scaler, 2)
    other = fp8fx.GradScaler(recipe, "cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == scaler.get_scale() == 128.0
    assert other.steps == 2
    train(recipe, other, 1)
    assert other.get_scale() == 4096.0
    plain = torch.amp.GradScaler("cpu").state_dict()
    other.load_state_dict(plain)  # a checkpoint from before fp8fx
    assert other.get_scale() == 65536.0


# -- underflow ------------------------------------------------------------------------------------------------------------


def test_underflow_is_warned_about_once_after_five_steps() -> None:
    off = fp8fx.GradScaler("hybrid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("direct", off, 5, loss_factor=1e-6)
    with pytest.warns(fp8fx.FP8Warning) as caught:
        train("direct", off, 9, loss_factor=1e-6)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1  # the layers before it get zeros, and zeros do not underflow
    assert "underflow at layer 'head': 100% of their non-zero elements became zero in e5m2, 5 steps running" in texts[0]
    assert "GradScaler(recipe='direct')" in texts[0]


def test_no_underflow_with_a_scaler_or_with_scaled_gradients() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("direct", fp8fx.GradScaler("direct", "cpu", init_scale=2.0**26), 8, loss_factor=1e-6)
        train("hybrid", fp8fx.GradScaler("hybrid"), 8, loss_factor=1e-6)
