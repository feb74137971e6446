"""Random models with one layer that FP8 hurts most: its input or its weight has an outlier channel, and the function is what it was.

    input     pre[j] = k, W[:, j] / k          weight     W[i, :] * k, post[i] = 1 / k         y = post (W (pre x) + b)

A scale per tensor follows the outlier, and what is k times smaller falls below the format's range: k is 2^18 for E4M3, whose values span
2^17.8, and 2^9 for E2M5, whose values span 2^8. Everything else (depth, widths, kind, seed of the weights, which layer) is random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NARROW = {"input": {"format": "e2m5"}, "weight": {"format": "e2m5"}}
RECIPES: dict[str, Any] = {"e4m3fn": "hybrid", "e2m5": {"extends": "hybrid", "defaults": NARROW}}
OUTLIER = {"e4m3fn": 2.0**18, "e2m5": 2.0**9}


class Layer(nn.Module):
    """A linear layer whose input and output channels have gains, 1 unless an outlier is planted."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        nn.init.normal_(self.linear.weight, std=1.5 * width**-0.5)  # attention is not uniform then, and every layer counts
        self.register_buffer("pre", torch.ones(width))
        self.register_buffer("post", torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.pre) * self.post

    @torch.no_grad()
    def plant(self, where: str, channel: int, k: float) -> None:
        if where == "input":
            self.pre[channel] = k
            self.linear.weight[:, channel] /= k
        else:
            self.linear.weight[channel] *= k
            self.linear.bias[channel] *= k
            self.post[channel] = 1 / k


class MLP(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, width) for _ in range(depth)])
        self.head = Layer(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(F.layer_norm(x, x.shape[-1:])))
        return self.head(F.layer_norm(x, x.shape[-1:]))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Layer(width, width) for _ in range(4))
        self.up, self.down = Layer(width, 2 * width), Layer(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:])
        scores = self.q(n) @ self.k(n).mT / x.shape[-1] ** 0.5
        x = x + self.o(scores.softmax(-1) @ self.v(n))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = Layer(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.blocks(x), x.shape[-1:]))


@dataclass(frozen=True)
class Planted:
    """`layer` is the site's name. The targets are drawn from the model's own output: in high precision it is as good as it can be."""

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss: Any
    recipe: Any
    layer: str
    about: str


def planted(seed: int, rows: int = 256) -> Planted:
    draw, _ = random.Random(seed), torch.manual_seed(seed)
    kind, format, where = draw.choice(("mlp", "transformer")), draw.choice(sorted(RECIPES)), draw.choice(("input", "weight"))
    width = draw.choice((16, 24, 32))
    model: nn.Module = MLP(width, draw.randint(2, 8)) if kind == "mlp" else Transformer(width, draw.randint(1, 2))
    layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    name = draw.choice(layers)
    layer = model.get_submodule(name)
    assert isinstance(layer, Layer)
    layer.plant(where, draw.randrange(len(layer.pre if where == "input" else layer.post)), OUTLIER[format])
    batches = [_batch(model, kind, rows, width) for _ in range(2)]
    loss = None if kind == "mlp" else soft_cross_entropy
    return Planted(
        model, batches, loss, RECIPES[format], f"{name}.linear", f"{kind}, {len(layers)} layers of {width}, {format}, outlier in {where}"
    )


@torch.no_grad()
def _batch(model: nn.Module, kind: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows of 8 tokens for a transformer. Targets: the output and noise (mean square error), or the output's probabilities."""
    x = torch.randn(rows, width) if kind == "mlp" else torch.randn(rows // 8, 8, width)
    y = model(x)
    return (x, y + 0.3 * torch.randn_like(y)) if kind == "mlp" else (x, y.softmax(-1))


def soft_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, probabilities = batch
    return F.cross_entropy(model(x).flatten(0, -2), probabilities.flatten(0, -2))
