"""Layers for the tests of operators, and what fp8fx decides of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fp8fx

OUTPUT_ONLY = {"input": "none", "weight": "none", "grad_output": "none", "output": {"format": "e5m2", "scaling": "none"}}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe(**defaults: Any) -> dict[str, Any]:
    return {"extends": "hybrid", "defaults": defaults}


class Layers(nn.Module):
    """Two square linears and a buffer; `run` is the forward."""

    def __init__(self, run: Callable[..., Any] | None = None, width: int = 8) -> None:
        super().__init__()
        self.fc, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("cache", torch.zeros(width, width))
        self.run = run
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(randn(*p.shape, seed=i + 1) / 3)

    def forward(self, x: Tensor) -> Any:
        assert self.run is not None
        return self.run(self, x)


def decisions(model: nn.Module, wanted: Any, *inputs: Any, **options: Any) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The output, and decision and reason of each site."""
    fast = fp8fx.compile(model, wanted, **options)
    y = fast(*inputs)
    return y, {row.name: (row.decision, row.reason) for row in fast.plan().rows}


def similar(ours: Tensor, theirs: Tensor, share: float = 0.15) -> bool:
    return float((ours - theirs).detach().norm()) <= share * float(theirs.detach().norm())
