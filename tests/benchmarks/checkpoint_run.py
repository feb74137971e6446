"""A training run whose state can be told from any other: what is killed and saved in checkpoint_torture.py."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp8fx

RECIPE = {"extends": "delayed", "defaults": {"grad_output": {"rounding": "stochastic"}}}
WIDTH, KILLED_WIDTH = 64, 512  # of the model; the larger one's file, 10 MB, takes about as long to write as a step to train


class Run:
    """A small training run whose step n depends on nothing but the state and n; step() leaves gradients of a started accumulation."""

    def __init__(
        self, seed: int = 0, width: int = WIDTH, recipe: Any = None, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    ) -> None:
        torch.manual_seed(seed)
        self.width = width
        self.fast = fp8fx.compile(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)), recipe or RECIPE)
        self.optimizer = optimizer(self.fast.parameters(), lr=1e-3)
        self.scaler = fp8fx.GradScaler("direct", device="cpu", init_scale=1024.0, growth_interval=3)
        self.steps = 0

    def backward(self, number: int) -> None:
        x = torch.randn(8, self.width, generator=torch.Generator().manual_seed(number))
        self.scaler.scale((self.fast(x) - x).square().mean()).backward()

    def step(self) -> None:
        self.steps += 1
        self.backward(2 * self.steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.backward(2 * self.steps + 1)  # half of the next step: gradients, and amax of the step so far

    def save(self, path: Path) -> None:
        fp8fx.save(self.fast, path, optimizer=self.optimizer, scaler=self.scaler, extra={"steps": self.steps})

    def load(self, path: Path) -> None:
        self.steps = fp8fx.load(path, self.fast, optimizer=self.optimizer, scaler=self.scaler).extra["steps"]

    def fingerprint(self) -> str:
        """SHA-256 of everything that counts."""
        found = hashlib.sha256()
        grads = {name: parameter.grad for name, parameter in self.fast.named_parameters()}
        for part in (self.fast.state_dict(), grads, self.optimizer.state_dict(), self.scaler.state_dict(), self.steps):
            _feed(found, part)
        return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(repr(key).encode())
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(found, item)
    else:
        found.update(repr(value).encode())
