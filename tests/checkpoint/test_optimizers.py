"""Optimizers of every kind, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.runs import same
from checkpoint.small import compiled, make, state, train
from torch import Tensor, nn

import fp8fx

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True, "lr": torch.tensor(1e-3)},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "LBFGS": {"history_size": 3, "max_iter": 4},
}


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, start: int = 0) -> None:
    """Steps on made-up gradients, sparse for SparseAdam."""
    for step in range(start, start + steps):

        def closure(step: int = step) -> Tensor:
            for number, parameter in enumerate(parameters):
                grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + number)).to(parameter.dtype)
                parameter.grad = grad.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else grad
            return sum((p.detach().float().sum() for p in parameters), torch.tensor(0.0))

        optimizer.step(closure)
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_goes_on_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also those whose state has more bits than the parameters, which torch's own load_state_dict rounds."""
    fast, other = compiled().to(dtype), compiled(1).to(dtype)
    weights, others = ([p for p in model.parameters() if p.dim() == 2] for model in (fast, other))
    options = {"lr": 1e-2, **OPTIONS.get(name, {})}
    optimizer, made = (OPTIMIZERS[name](parameters, **copy.deepcopy(options)) for parameters in (weights, others))
    run(optimizer, weights, 3)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
    assert same(state(made), state(optimizer)) == []
    run(optimizer, weights, 3, start=3)
    run(made, others, 3, start=3)
    assert same(state(other, made), state(fast, optimizer)) == []


def test_parameters_are_matched_by_name(tmp_path: Path) -> None:
    """torch pairs them by position: the state of one weight would become the other's, which has its shape."""
    fast, other = compiled(), compiled(1)
    optimizer = torch.optim.Adam([{"params": [fast[0].weight, fast[2].weight]}, {"params": [fast[0].bias], "lr": 0.5}])
    made = torch.optim.Adam([{"params": [other[2].weight, other[0].weight]}, {"params": [other[0].bias]}])
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
    for layer in (0, 2):
        assert torch.equal(made.state[other[layer].weight]["exp_avg"], optimizer.state[fast[layer].weight]["exp_avg"])
    assert made.param_groups[1]["lr"] == 0.5
    train(fast, optimizer)
    train(other, made)
    assert same(state(other), state(fast)) == []


def groups(fast: nn.Module, kind: str) -> torch.optim.Optimizer:
    a, b, c, d = fast.parameters()
    return {
        "as saved": lambda: torch.optim.AdamW([{"params": [a, c]}, {"params": [b, d], "weight_decay": 0.0}]),
        "one group": lambda: torch.optim.AdamW(fast.parameters()),
        "moved": lambda: torch.optim.AdamW([{"params": [a, b]}, {"params": [c, d]}]),
        "fewer": lambda: torch.optim.AdamW([{"params": [a]}, {"params": [b, d]}]),
        "Adam": lambda: torch.optim.Adam([{"params": [a, c]}, {"params": [b, d]}]),
        "of another model": lambda: torch.optim.AdamW([{"params": [p]} for p in list(make().parameters())[:2]]),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one group", "optimizer has 2 parameter groups in the file and 1 here"),
        ("moved", "group 0 of optimizer holds other parameters.*only here '0.bias'; only there '2.weight'"),
        ("fewer", "group 0 of optimizer.*2 parameters there, 1 here; only there '2.weight'"),
        ("Adam", "optimizer is a AdamW in the file and a Adam here: their states mean different things"),
        ("of another model", "holds none of the model's parameters"),
    ],
)
def test_other_optimizers_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    fast, other = compiled(), compiled(1)
    optimizer = groups(fast, "as saved")
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    made = groups(other, kind)
    before = state(other, made)
    with pytest.raises(fp8fx.CheckpointError, match=message):
        fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
    assert same(state(other, made), before) == []
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=groups(other, "as saved"))


def test_several_optimizers_and_schedulers(tmp_path: Path) -> None:
    def setup(seed: int) -> tuple[Any, ...]:
        fast = compiled(seed)
        optimizers = [torch.optim.SGD(fast[0].parameters(), 0.1, momentum=0.9), torch.optim.AdamW(fast[2].parameters())]
        kinds = torch.optim.lr_scheduler
        schedulers = [
            kinds.MultiStepLR(optimizers[0], [1, 2]),
            kinds.OneCycleLR(optimizers[1], 0.1, 10),
            kinds.ReduceLROnPlateau(optimizers[0]),
        ]
        return fast, optimizers, schedulers

    fast, optimizers, schedulers = setup(0)
    for optimizer in optimizers:
        train(fast, optimizer, 1)
    schedulers[0].step()
    schedulers[1].step()
    schedulers[2].step(0.5)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizers, scheduler=tuple(schedulers))
    other, made, kinds = setup(1)
    with pytest.raises(fp8fx.CheckpointError, match=r"holds 2 optimizer\(s\), and 1 were passed"):
        fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made[0])
    with pytest.raises(fp8fx.CheckpointError, match=r"scheduler\[0\] is a MultiStepLR in the file and a OneCycleLR here"):
        fp8fx.load(tmp_path / "a.safetensors", other, scheduler=[kinds[1], kinds[0], kinds[2]])
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made, scheduler=kinds)
    assert same(state(other, *made, *kinds), state(fast, *optimizers, *schedulers)) == []


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another, as accelerate makes them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


def test_an_optimizer_around_another(tmp_path: Path) -> None:
    fast, other = compiled(), compiled(1)
    optimizer, made = torch.optim.AdamW(fast.parameters()), torch.optim.AdamW(other.parameters())
    train(fast, optimizer)
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=Wrapped(optimizer))
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=Wrapped(made))
    assert same(state(other, made), state(fast, optimizer)) == []
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made)
