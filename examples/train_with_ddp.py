"""DistributedDataParallel in FP8: two processes with half of each batch train as one process with the whole of it.

python examples/train_with_ddp.py [recipe]        recipe: delayed (default), hybrid, ... or a path to a YAML file

Needs nothing but fp8fx. Starts the processes itself, with gloo on the CPU; takes about ten seconds. Under delayed scaling all processes
follow one amax, so that their scales are those of the one process; under current scaling each has the scale of its own part.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fp8fx
from fp8fx.demo.data import python_source, text_batches
from fp8fx.demo.models import GPT

CONTEXT, BATCH, STEPS = 32, 8, 10
SOURCES = Path(asyncio.__file__).parent  # one package of the standard library is text enough here


def train(recipe: str, rank: int, world: int) -> dict[str, Tensor]:
    """STEPS steps of this process's part of each batch. Returns the model's state_dict."""
    torch.manual_seed(0)
    model = GPT(width=32, layers=2, heads=2, context=CONTEXT)
    fast = fp8fx.compile(model, recipe)
    parallel = DistributedDataParallel(fast) if world > 1 else fast
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    for inputs, targets in text_batches(python_source(SOURCES, 100_000, 4096).train, BATCH, CONTEXT, STEPS, seed=0):
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = F.cross_entropy(parallel(inputs[part]).flatten(0, 1), targets[part].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in fast.state_dict().items()}


def process(rank: int, recipe: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(train(recipe, rank, world), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def main(recipe: str = "delayed") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (recipe, 2, folder), nprocs=2)
        two = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
    one = train(recipe, 0, 1)
    same = all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    print(f"the two processes end with {'one state' if same else 'different states'}, scales and weights")
    scales = [name for name in one if name.endswith(".scale") and ".grad_" not in name]
    equal = sum(torch.equal(two[0][name], one[name]) for name in scales)
    print(f"{equal} of {len(scales)} scales of activations and weights equal those of one process with the whole batch")
    far = max(((two[0][name] - one[name]).norm() / one[name].norm()).item() for name in fp8fx.strip(one) if one[name].norm() > 0)
    print(f"the weights differ by at most {far:.1e} of their norm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="delayed", help="a shipped recipe's name, or the path of a YAML file")
    main(**vars(parser.parse_args()))
