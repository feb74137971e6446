"""The model and the recipes of the tests of delayed scaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.clone import IN_PLACE, runtime_of

ALL_ROLES = {role: {"scaling": "delayed"} for role in ("input", "weight", "output", "grad_output", "grad_input", "grad_weight")}
SATURATED = {role: {"scaling": "delayed", "overflow": "saturate"} for role in ("grad_output", "grad_input", "grad_weight")}
EVERY_ROLE: dict[str, Any] = {"extends": "delayed", "defaults": {**ALL_ROLES, **SATURATED}}
RECIPES: dict[str, Any] = {
    "delayed": "delayed",
    "after": {"extends": "delayed", "delayed": {"order": "after", "history": 3}},
    "most_recent": {"extends": "delayed", "delayed": {"algorithm": "most_recent", "margin": 1}},
    "not_powers_of_two": {"extends": "delayed", "scale": {"power_of_two": False}},
    "every_role": EVERY_ROLE,
}


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = torch.matmul(self.q(h), self.k(h).transpose(-1, -2)).softmax(-1)
        x = x + torch.matmul(scores, self.v(h))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Shared inputs, products without a parameter, an mlp, a convolution, and a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(11, 16), Block()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 11)

    def forward(self, index: Tensor) -> Tensor:
        x = self.block(self.embed(index))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.block(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int, size: int = 2) -> Tensor:
    return torch.randint(0, 11, (size, 6), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Callable[..., Tensor], index: Tensor) -> Tensor:
    return F.cross_entropy(model(index).flatten(0, 1), index.flatten())


def by_backend(model: nn.Module, recipe: Any, inner: str) -> tuple[Any, Callable[[], Any]]:
    torch._dynamo.reset()  # torch's own limit of compilations counts all models of one class
    fast = torch.compile(model, backend="fp8fx", options={"recipe": recipe, "inner": inner}, fullgraph=True)

    def runtime() -> Any:
        (made,) = IN_PLACE[model].values()
        return made

    return fast, runtime


def by_compile(model: nn.Module, recipe: Any, inner: str) -> tuple[Any, Callable[[], Any]]:
    fast = fp8fx.compile(model, recipe, inner=inner, fullgraph=True)
    return fast, lambda: runtime_of(fast)


def scales(fast: nn.Module) -> dict[str, Tensor]:
    """Everything that is kept, by `<site>.<role>.<field>`."""
    return {
        key.removeprefix("_fp8fx."): value for key, value in fp8fx.state_dict(fast).items() if key.endswith((".scale", ".history", ".amax"))
    }


def train(fast: nn.Module, steps: int, seed: int = 0, microbatches: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    for step in range(steps):
        for micro in range(microbatches):
            loss_of(fast, batch(100 * seed + 10 * step + micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_equal_state(one: nn.Module, two: nn.Module) -> None:
    a, b = fp8fx.state_dict(one), fp8fx.state_dict(two)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
