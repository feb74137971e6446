"""One of two processes that train together:  python ddp_worker.py RANK FOLDER

Runs every case of CASES in order and writes what it saw to FOLDER/RANK.pt; test_distributed.py starts two of them and judges.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fp8fx
from fp8fx.demo.data import python_source, text_batches
from fp8fx.demo.models import GPT

WORLD = 2


class Exact(nn.Module):
    """Small integers in, an L1 loss: every sum of its GEMMs is exact in float32, whatever its order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_((parameter * 64).round() / 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def exact_batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-3, 4, (8, 16), generator=generator).float() * (1 + step) for step in range(steps)]


def part(x: Tensor, rank: int, world: int) -> Tensor:
    return x[rank * len(x) // world : (rank + 1) * len(x) // world]


def train_exact(fast: nn.Module, model: nn.Module, batches: list[Tensor], rank: int, world: int) -> None:
    """The loss is a sum, of which DDP averages the gradients: `world` times the rate makes it the sum over all again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10 * world)
    for x in batches:
        for half in x.chunk(2):  # two microbatches, of which DDP exchanges gradients after each
            (fast(part(half, rank, world)) - 1000.0).abs().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def train_text(fast: nn.Module, model: nn.Module, steps: int, rank: int, world: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * world)
    for inputs, targets in text_batches(python_source(Path(asyncio.__file__).parent, 50_000, 4096).train, 8, 32, steps, seed=0):
        logits = fast(part(inputs, rank, world)).flatten(0, 1)
        loss = F.cross_entropy(logits, part(targets, rank, world).flatten(), reduction="sum") / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def text_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(width=32, layers=1, heads=2, context=32)


def compiled_text(model: nn.Module) -> nn.Module:
    """Without the table of positions: its gradient is summed over the batch before it is rounded, so each rounds a sum of its own."""
    return fp8fx.compile(model, "delayed", exempt=["position"])


def copied(fast: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in fast.state_dict().items()}


def exact(rank: int, folder: Path) -> Any:
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    train_exact(DistributedDataParallel(fast), model, exact_batches(5), rank, WORLD)
    return copied(fast)


def text(rank: int, folder: Path) -> Any:
    model = text_model()
    fast = compiled_text(model)
    train_text(DistributedDataParallel(fast), model, 6, rank, WORLD)
    return copied(fast)


def apart(rank: int, folder: Path) -> Any:
    """Each process with scales of its own."""
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    fp8fx.reduce_amax(fast, "none")
    train_exact(DistributedDataParallel(fast), model, exact_batches(3), rank, WORLD)
    return copied(fast)


def named_group(rank: int, folder: Path) -> Any:
    """Gradients averaged by hand, without DDP: the group is named."""
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    fp8fx.reduce_amax(fast, dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
    for x in exact_batches(3):
        (fast(part(x, rank, WORLD)) - 1000.0).abs().sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return copied(fast)


def resumed(rank: int, folder: Path) -> Any:
    """Five steps; and three, saved by the first process alone, loaded by both, and two more."""
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    train_exact(DistributedDataParallel(fast), model, exact_batches(5)[:3], rank, WORLD)
    if rank == 0:
        torch.save(fast.state_dict(), folder / "saved.pt")
    dist.barrier()
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    fast.load_state_dict(torch.load(folder / "saved.pt", weights_only=True))
    train_exact(DistributedDataParallel(fast), model, exact_batches(5)[3:], rank, WORLD)
    return copied(fast)


def calibrated(rank: int, folder: Path) -> Any:
    """A calibrating pass in DDP; the first process saves before the exchange, then both train."""
    model = Exact()
    fast = fp8fx.compile(model, "delayed")
    parallel = DistributedDataParallel(fast)
    x = part(exact_batches(1)[0], rank, WORLD)
    with fp8fx.autocast(calibrating=True):
        (parallel(x) - 1000.0).abs().sum().backward()
    early = copied(fast) if rank == 0 else {}
    parallel(x)
    return early, copied(fast)


class Branching(nn.Module):
    """The second process takes another branch first, and the first one never takes `b`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, second: bool) -> Tensor:
        return self.out(self.b(x) if second else self.a(x))


def branches(rank: int, folder: Path) -> Any:
    """A captured layer that another process has not: its records appear in both, in any order."""
    model = Branching()
    fast = fp8fx.compile(model, "delayed")
    parallel = DistributedDataParallel(fast, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(3):
        parallel(torch.full((4, 16), 1.0 + rank + step), rank == 1 and step != 1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return copied(fast)


def other_recipe(rank: int, folder: Path) -> Any:
    recipe = {"extends": "delayed", "defaults": {"input": {"format": "e5m2" if rank else "e4m3fn"}}}
    model = Exact()
    parallel = DistributedDataParallel(fp8fx.compile(model, recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    parallel(torch.ones(2, 16)).sum().backward()
    try:
        optimizer.step()
    except fp8fx.ModelError as error:
        return str(error)
    return ""


def random_bits(rank: int, folder: Path) -> Any:
    """The same batch in both processes: equal gradients, rounded differently, and each as in a single process of that rank."""
    model = Exact()
    fast = fp8fx.compile(model, "direct")
    parallel = DistributedDataParallel(fast)
    with parallel.no_sync():
        (parallel(torch.linspace(-1, 1, 32).view(2, 16)) * torch.linspace(0.9, 1.1, 16).view(2, 8)).sum().backward()
    return model.up.weight.grad


def buckets(rank: int, folder: Path) -> Any:
    """More than DDP's first bucket of 1 MiB, at whose border Dynamo would cut the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))
    fast = fp8fx.compile(model, "delayed")
    DistributedDataParallel(fast, bucket_cap_mb=1)(torch.randn(2, 600)).sum().backward()
    return len(fast._fp8fx_runtime.graphs), sorted(fp8fx.state_dict(fast))


CASES: list[Callable[[int, Path], Any]] = [
    exact, text, apart, named_group, resumed, calibrated, branches, other_recipe, random_bits, buckets,
]  # fmt: skip


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", fp8fx.FP8Warning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save({case.__name__: case(rank, folder) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
