"""Two models for the tests of `fp8fx.compile`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx


class Net(nn.Module):
    """A little of everything: config, buffer, method that calls the model, optional arguments, an unused layer's hook."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.config = {"width": width}
        self.fc1, self.fc2, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """The documented forward."""
        h = F.relu(self.fc1(x))
        h = h + self.fc2(h)
        y = self.head(h) * scale
        return y if mask is None else y * mask

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


class Mixed(nn.Module):
    """Embedding, convolution, products of activations, a layer called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(12, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        x = torch.softmax(scores, -1) @ self.q(x)
        return self.out(x)


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def rows(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def is_fp8(model: nn.Module, x: Tensor | None = None) -> bool:
    """The model's output differs from high precision, and its plan says why."""
    x = rows() if x is None else x
    with torch.no_grad():
        return not torch.equal(model(x), fp8fx.unwrap(model)(x)) and bool(fp8fx.plan(model).fp8)
