"""Master weights in 16 bits: the grid, what arrives of small updates, resuming, and training under direct and hybrid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.qat.master import round_to

DTYPES = (torch.float16, torch.bfloat16)


def drifted(dtype: torch.dtype, rounding: str, stored: torch.dtype, seed: int = 0) -> Tensor:
    """1 after 100 updates of 1e-4, which is below half a step of both grids at 1."""
    parameter = nn.Parameter(torch.ones(4096, dtype=stored))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    fp8fx.MasterWeights(optimizer, dtype, rounding=rounding, seed=seed)
    for _ in range(100):
        parameter.grad = torch.full_like(parameter, -1e-4)
        optimizer.step()
    assert parameter.dtype == stored
    assert torch.equal(parameter.detach().to(dtype).float(), parameter.detach().float())
    return parameter.detach().float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_updates_arrive_on_the_average_and_are_lost_to_nearest(dtype: torch.dtype) -> None:
    """The mean of 4096 weights, each the sum of 100 roundings of variance at most step^2 / 4: 6 deviations are 6 * step * 10 / 2 / 64."""
    step = torch.finfo(dtype).eps
    for stored in (torch.float32, dtype):
        mean = float(drifted(dtype, "stochastic", stored).double().mean())
        assert abs(mean - 1.01) < 6 * step * 10 / 2 / 64
        assert float(drifted(dtype, "nearest_even", stored).max()) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_the_cast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000) * torch.exp(6 * torch.randn(20_000))
    x = torch.cat([x.clamp(-6e4, 6e4), torch.tensor([0.0, -0.0, 6e-8, 3e-8, 65504.0])])
    assert torch.equal(round_to(x, dtype, "nearest_even", None), x.to(dtype).float())
    for rounding, holds in (("up", lambda y: y >= x), ("down", lambda y: y <= x), ("toward_zero", lambda y: y.abs() <= x.abs())):
        assert bool(holds(round_to(x, dtype, rounding, None)).all())


def test_bits_depend_on_seed_parameter_and_step_only() -> None:
    first = drifted(torch.float16, "stochastic", torch.float32)
    assert torch.equal(first, drifted(torch.float16, "stochastic", torch.float32))
    assert torch.equal(first, drifted(torch.float16, "stochastic", torch.float16)), "both ways of storing take the same decisions"
    assert not torch.equal(first, drifted(torch.float16, "stochastic", torch.float32, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_a_loss_scale_takes_any_parameters_but_float16(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    fp8fx.MasterWeights(optimizer, torch.float16 if dtype == torch.float32 else dtype)
    scaler = fp8fx.GradScaler("direct", device="cpu")
    scaler.scale(parameter.float().sum()).backward()
    if dtype == torch.float16:
        for unscale in (scaler.unscale_, scaler.step):
            with pytest.raises(fp8fx.ModelError, match=r"float16 parameters.* Keep the parameters in float32"):
                unscale(optimizer)
        return
    scaler.step(optimizer)
    assert bool((parameter == 0.0).all())


class Run:
    """A small regression under `recipe`, with 16-bit master weights."""

    def __init__(self, recipe: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.fast = fp8fx.compile(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), recipe)
        self.optimizer = torch.optim.AdamW(self.fast.parameters(), lr=1e-2)
        self.scaler = fp8fx.GradScaler(recipe, device="cpu")
        fp8fx.MasterWeights(self.optimizer, seed=7)

    def train(self, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            loss = F.mse_loss(self.fast(x), (x[:, :4] - x[:, 4:8]).tanh())
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("recipe", ["direct", "hybrid"])
def test_training_stays_on_the_grid_and_resumes_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    run = Run(recipe, 0)
    losses = run.train(0, 30)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for parameter in run.fast.parameters():
        assert torch.equal(parameter.detach(), parameter.detach().half().float())
    path = tmp_path / "run.safetensors"
    fp8fx.save(run.fast, path, optimizer=run.optimizer, scaler=run.scaler)
    other = Run(recipe, 1)
    fp8fx.load(path, other.fast, optimizer=other.optimizer, scaler=other.scaler)
    assert run.train(30, 34) == other.train(30, 34)
    for ours, theirs in zip(run.fast.parameters(), other.fast.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_skipped_step_rounds_nothing_and_removing_ends_it() -> None:
    run = Run("direct", 0)
    run.train(0, 1)
    before = run.optimizer.state_dict()["fp8fx_master_weights"]["steps"]
    x = torch.full((4, 16), 1e30)
    run.optimizer.zero_grad()
    run.scaler.scale(run.fast(x).square().sum()).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert run.optimizer.state_dict()["fp8fx_master_weights"]["steps"] == before
    run.optimizer._fp8fx_master_weights.remove()
    run.train(2, 4)
    assert any(not torch.equal(p.detach(), p.detach().half().float()) for p in run.fast.parameters())
    assert "fp8fx_master_weights" not in run.optimizer.state_dict()


def refused(message: str, call: Any) -> None:
    with pytest.raises(fp8fx.FP8Error, match=message):
        call()


def test_mistakes() -> None:
    def optimizer(dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.ones(3, dtype=dtype))], lr=0.1)

    refused("takes a torch.optim.Optimizer, got int", lambda: fp8fx.MasterWeights(3))
    refused("dtype=torch.float32", lambda: fp8fx.MasterWeights(optimizer(), torch.float32))
    refused("rounding='random'", lambda: fp8fx.MasterWeights(optimizer(), rounding="random"))
    refused("is float64; allowed are float32 and float16", lambda: fp8fx.MasterWeights(optimizer(torch.float64)))
    twice = optimizer()
    fp8fx.MasterWeights(twice)
    refused("has fp8fx.MasterWeights already", lambda: fp8fx.MasterWeights(twice))
    other = optimizer()
    fp8fx.MasterWeights(other, torch.bfloat16)
    state = copy.deepcopy(twice.state_dict())
    refused("saved with master weights in float16", lambda: other.load_state_dict(state))
    narrow = optimizer(torch.float16)
    fp8fx.MasterWeights(narrow)
    refused("step without a closure", lambda: narrow.step(lambda: 0.0))
