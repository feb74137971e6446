"""Stop a run in the middle of gradient accumulation, resume it, and end with the same bits. A few seconds on a CPU.

python examples/checkpoint.py [recipe]        recipe: delayed (default), hybrid, direct, ..., or a path to a YAML file
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fp8fx

STEPS, MICROBATCHES, STOP = 20, 2, 21  # stop after 21 of 40 microbatches: within step 11


class Run:
    """A model and what trains it; `done` counts microbatches."""

    def __init__(self, recipe: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.fast = fp8fx.compile(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 10)), recipe)
        self.optimizer = torch.optim.AdamW(self.fast.parameters(), lr=3e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = fp8fx.GradScaler(recipe)
        self.done = 0

    def train(self, until: int) -> None:
        while self.done < until:
            data = torch.Generator().manual_seed(self.done)  # stands for a data loader that can go on where it stopped
            x, labels = torch.randn(64, 32, generator=data), torch.randint(0, 10, (64,), generator=data)
            self.scaler.scale(F.cross_entropy(self.fast(x), labels) / MICROBATCHES).backward()
            self.done += 1
            if self.done % MICROBATCHES == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        extra = {"done": self.done, "rng": torch.get_rng_state()}  # the random state: of dropout
        fp8fx.save(self.fast, path, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler, extra=extra)

    def load(self, path: Path) -> None:
        loaded = fp8fx.load(self.fast, path, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler)
        self.done = loaded.extra["done"]
        torch.set_rng_state(loaded.extra["rng"])


def main(recipe: str = "delayed") -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.safetensors"
        run = Run(recipe, seed=0)
        run.train(until=STOP)
        run.save(path)
        print(f"saved after {run.done} microbatches: {path.stat().st_size:,} bytes")
        run.train(until=STEPS * MICROBATCHES)

        resumed = Run(recipe, seed=1)  # as in a new process: nothing is left of the first run but the file
        resumed.load(path)
        resumed.train(until=STEPS * MICROBATCHES)
        pairs = zip(run.fast.state_dict().values(), resumed.fast.state_dict().values(), strict=True)
        print("resumed run ends with the same bits:", all(torch.equal(ours, theirs) for ours, theirs in pairs))

        other = fp8fx.compile(fp8fx.unwrap(run.fast), "hybrid" if recipe != "hybrid" else "delayed")
        try:
            fp8fx.load(other, path)
        except fp8fx.CheckpointError as error:
            print(f"another recipe is refused: {str(error).splitlines()[1].strip()}")
        print(fp8fx.load(other, path, migrate=True))

        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        try:
            fp8fx.load(other, path)
        except fp8fx.CheckpointError as error:
            print(f"a flipped bit is refused: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="delayed", help="a shipped recipe's name, or the path of a YAML file")
    main(**vars(parser.parse_args()))
