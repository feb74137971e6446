"""The processes of test_distributed.py: one per rank, gloo.

    python -P tests/checkpoint/distributed.py WHAT RANK WORLD DIRECTORY        WHAT: save, load, load migrated

Each rank trains alike on all but the last half step, so that only what ranks measure in the step so far differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

import fp8fx


def make(seed: int, recipe: Any = "delayed") -> nn.Module:
    torch.manual_seed(seed)
    return fp8fx.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), recipe, capture="symbolic")


def step(fast: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    fast(batch(number)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def batch(number: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(number))


def everything(fast: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {key: value.clone() for key, value in fast.state_dict().items()}
    for number, parameter in enumerate(fast.parameters()):
        found |= {f"optimizer.{number}.{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def trained(rank: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Three steps, and the first half of a fourth whose batch is the rank's own."""
    fast = make(0)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-2)
    scaler = fp8fx.GradScaler("direct", device="cpu", init_scale=4.0)
    for number in range(3):
        step(fast, optimizer, number)
    fast((1 + rank) * batch(9)).sum().backward()
    optimizer.zero_grad()
    return fast, optimizer, scaler


def run(what: str, rank: int, directory: Path) -> None:
    checkpoint = {"checkpoint_id": str(directory / "dcp")}
    if what == "save":
        fast, optimizer, scaler = trained(rank)
        dcp.save({"run": fp8fx.DistributedState(fast, optimizer, scaler)}, **checkpoint)
    else:
        migrate = what == "load migrated"
        fast = make(5 + rank, {"extends": "delayed", "delayed": {"history": 4}} if migrate else "delayed")
        optimizer, scaler = torch.optim.AdamW(fast.parameters(), lr=1.0), fp8fx.GradScaler("direct", device="cpu", init_scale=64.0)
        state = fp8fx.DistributedState(fast, optimizer, scaler, migrate=migrate)
        dcp.load({"run": state}, **checkpoint)
        assert bool(state.migrated) == migrate
        assert scaler.state_dict()["scale"] == 4.0
    save_file(everything(fast, optimizer), directory / f"{what} {rank}")
    step(fast, optimizer, 10)
    step(fast, optimizer, 11)
    save_file(everything(fast, optimizer), directory / f"{what} {rank} after")


def main(what: str, rank: str, world: str, directory: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory}/store of {world} {what}"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(world))
    try:
        for each in what.split(","):
            run(each, int(rank), Path(directory))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
