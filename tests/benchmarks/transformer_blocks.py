"""The models of the benchmarks: two blocks of Llama-3-8B, and the layer of TransformerEngine's quickstart. Random weights, bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    layers: int = 2
    length: int = 2048


LLAMA = Size()
QUICKSTART = Size(kv_heads=32, hidden=16384, layers=1)
TINY = Size(64, 4, 2, 160, 1, 32)
TINY_QUICKSTART = Size(64, 4, 4, 256, 1, 32)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, head = size, size.width // size.heads
        self.norm1, self.norm2 = (nn.RMSNorm(size.width, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(size.width, size.kv_heads * head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self._heads(p(h)) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size.width // self.size.heads)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Blocks(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        head = size.width // size.heads
        angles = torch.outer(torch.arange(size.length), 5e5 ** (-torch.arange(0, head, 2) / head)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cos.to(x.dtype), self.sin.to(x.dtype))  # type: ignore[operator]
        return x


class Quickstart(nn.Module):
    """BasicTransformerLayer of TransformerEngine's quickstart, its attention as torch's fused one, with a dropout after the MLP too."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.projection = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.linear1, self.linear2 = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.dropout1(self.projection(a.transpose(1, 2).flatten(2)))
        h = F.gelu(self.linear1(self.norm2(x)), approximate="tanh")
        return x + self.dropout2(self.linear2(h))


def make(kind: type[nn.Module], size: Size, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model in training mode, the same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind(size).to(dtype).train()


def tokens(size: Size, batch: int, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [B, L, D] that wants a gradient, and dy / D of the same shape; bf16, unit variance before the division."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, size.length, size.width)
    x, dy = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), dy / size.width
