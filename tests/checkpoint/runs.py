"""Training runs that are stopped and go on in a new process; run as a script, this file is that process.

python -P tests/checkpoint/runs.py DIRECTORY        for each NAME.safetensors there: load, go on, write NAME.done.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx

MICROBATCHES = 2
HALF, WHOLE = 10, 20  # steps


class Net(nn.Module):
    """Embedding, norm, linear layers, dropout, a buffer that training moves, and a head tied to the embedding."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 16), nn.BatchNorm1d(16)
        self.up, self.down, self.dropout = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(dropout)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Run:
    """One run under one recipe. Everything it does follows from its state and torch's random state."""

    def __init__(self, recipe: Any, seed: int = 0) -> None:
        torch.manual_seed(seed)
        capture = "dynamo" if recipe in ("delayed", "direct") else "symbolic"  # quicker, and no other state
        self.fast = fp8fx.compile(Net(), recipe, capture=capture)
        self.optimizer = torch.optim.AdamW(self.fast.parameters(), lr=2e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, WHOLE)
        self.scaler = fp8fx.GradScaler(recipe, device="cpu", init_scale=256.0, growth_interval=4)
        self.microbatches = 0

    def microbatch(self) -> None:
        index = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(self.microbatches))
        loss = F.cross_entropy(self.fast(index).flatten(0, 1), index.roll(1).flatten())
        self.scaler.scale(loss / MICROBATCHES).backward()
        self.microbatches += 1
        if self.microbatches % MICROBATCHES == 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def until(self, microbatches: int) -> Run:
        while self.microbatches < microbatches:
            self.microbatch()
        return self

    def save(self, path: Path) -> None:
        extra = {"microbatches": self.microbatches, "rng": torch.get_rng_state()}
        fp8fx.save(self.fast, path, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler, extra=extra)

    def load(self, path: Path) -> Run:
        made = fp8fx.load(path, self.fast, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler)
        self.microbatches = made.extra["microbatches"]
        torch.set_rng_state(made.extra["rng"])
        assert made.unused == made.migrated == []
        return self

    def everything(self) -> dict[str, Tensor]:
        """Weights, buffers, FP8 state, gradients, optimizer, scheduler, scaler and torch's random state as tensors by name."""
        found: dict[str, Tensor] = {"torch rng": torch.get_rng_state()}
        grads = {name: parameter.grad for name, parameter in self.fast.named_parameters()}
        parts = (self.fast.state_dict(), grads, self.optimizer.state_dict(), self.scheduler.state_dict(), self.scaler.state_dict())
        for name, part in zip(("model", "grad", "optimizer", "scheduler", "scaler"), parts, strict=True):
            collect(found, name, part)
        return found


def collect(found: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach().clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            collect(found, f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            collect(found, f"{name}.{number}", item)
    else:
        found[f"{name} = {value!r}"] = torch.zeros(1)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that differ, bit for bit."""
    differing = [key for key in ours.keys() & theirs.keys() if not torch.equal(bits(ours[key]), bits(theirs[key]))]
    return sorted(ours.keys() ^ theirs.keys()) + sorted(differing)


def bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    for path in sorted(directory.glob("*.safetensors")):
        run = Run(path.name.partition(" ")[0], seed=99).load(path)  # everything must come from the file
        save_file(run.until(WHOLE * MICROBATCHES).everything(), path.with_suffix(".done"))


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
