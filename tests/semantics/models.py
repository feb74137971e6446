"""The small models of this folder. Importable, so that they pickle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, norm, a residual linear - gelu - linear, and a head: [..., 16] -> [..., 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.feed(self.norm(x))
        return self.head(x)

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Products of activations between linears, without the key's bias, whose gradient is zero: [..., T, 16] -> [..., T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).mT / 4, -1)
        return self.proj(weights @ self.v(x))


class Modal(nn.Module):
    """Behaves otherwise in evaluation: batch norm's statistics and a dropout."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.inp, self.norm, self.drop, self.out = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(p), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.relu(self.norm(self.inp(x)))))
