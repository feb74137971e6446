"""Models for the tests of bad input, and the promise that they are never changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def rows(n: int = 3) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


class Branch(nn.Module):
    """Python that depends on data: Dynamo breaks the graph, symbolic tracing fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Weight(nn.Module):
    """A linear whose weight may have a size of zero."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, k))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a caller can see of a model, tensors by identity and by value."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    modules = list(model.named_modules())
    return {
        "class": [type(m) for _, m in modules],
        "identity": [id(m) for _, m in modules],
        "training": [m.training for _, m in modules],
        "keys": [sorted(vars(m)) for _, m in modules],
        "hooks": [[len(vars(m)[key]) for key in hooks] for _, m in modules],
        "tensors": {name: (id(t), t.requires_grad, t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "state_keys": list(model.state_dict()),
    }


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """The model looks the same after the block as before it, and computes the same bits."""
    before, values = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        outputs = model(*inputs) if inputs else None
    yield
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value.nan_to_num(7.0), values[key].nan_to_num(7.0)), key
    if outputs is not None:
        with torch.no_grad():
            assert torch.equal(model(*inputs), outputs)
