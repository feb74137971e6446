"""A small compiled model that trains, and its state."""

from __future__ import annotations

from typing import Any

import torch
from checkpoint.runs import collect
from torch import Tensor, nn

import fp8fx


def make(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def compiled(seed: int = 0, recipe: Any = "delayed", **options: Any) -> nn.Module:
    return fp8fx.compile(make(seed, **options), recipe, capture="symbolic")


def state(*parts: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        if isinstance(part, nn.Module):
            collect(found, f"{number}.grad", {name: p.grad for name, p in part.named_parameters()})
        collect(found, str(number), part.state_dict())
    return found


def train(fast: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        fast(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
