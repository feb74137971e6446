"""The small models of the gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """norm -> q, k (shared input) -> scores -> softmax -> mix, then norm -> linear -> gelu -> linear."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2)
        x = x + F.softmax(scores / 4, dim=-1) @ self.v(h)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Broken(Block):
    """The same with a graph break in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2)
        torch._dynamo.graph_break()
        x = x + F.softmax(scores / 4, dim=-1) @ self.v(h)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Blocks between layers of its own, so that a block's names in the root differ from its names in its own frame."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([block(), block()])
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight, and one block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.block = Block()
        self.again = self.block
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.again(self.block(self.embed(index))))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))
