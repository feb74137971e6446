"""Lightning in FP8: a byte-level GPT on Python's own source text, stopped, resumed, and equal to the run that was not stopped.

python examples/train_with_lightning.py [recipe]        recipe: delayed (default), direct, hybrid, ... or a path to a YAML file

Needs `pip install '.[trainers]'`. Takes half a minute on a CPU; everything it writes is in trainer-out/lightning.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fp8fx
from fp8fx.demo.data import python_source, text_batches
from fp8fx.demo.environment import mend_torchvision
from fp8fx.demo.models import GPT

if missing := [name for name in ("lightning", "tensorboard") if importlib.util.find_spec(name) is None]:
    sys.exit(f"this example needs what is not installed: {', '.join(missing)}. Install it with  pip install '.[trainers]'")
mend_torchvision()
import lightning.pytorch as pl  # noqa: E402

from fp8fx.trainers.lightning import LossScaling, StatisticsCallback  # noqa: E402

CONTEXT = 32
SOURCES = Path(asyncio.__file__).parent  # one package of the standard library is text enough here


class Language(pl.LightningModule):
    """The compiled model is a submodule like any other; its FP8 state is part of the checkpoint's state_dict."""

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.fast = fp8fx.compile(GPT(width=32, layers=2, heads=2, context=CONTEXT), recipe)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.fast(inputs).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.fast.parameters(), lr=3e-3)


class Batches:
    """Batches of text that go on where they stopped: Lightning saves and restores what has these methods, within an epoch too."""

    def __init__(self, count: int = 1000) -> None:
        self.tokens = python_source(SOURCES, 100_000, 4096).train
        self.count, self.done = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(text_batches(self.tokens, 4, CONTEXT, self.count, seed=0)):
            if index >= self.done:
                self.done += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def train(recipe: str, folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
    """Train up to step `steps`, from the checkpoint in `folder` if `resume`, and save there. Returns the module's state_dict."""
    pl.seed_everything(0, verbose=False)
    module = Language(recipe)
    trainer = pl.Trainer(
        max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[LossScaling(recipe, device="cpu")],  # a pass-through for recipes that need no loss scaling
        callbacks=[StatisticsCallback(jsonl=folder / "fp8.jsonl", tensorboard=folder / "tensorboard", every=5)],
    )  # fmt: skip
    checkpoint = folder / "last.ckpt"
    trainer.fit(module, Batches(), ckpt_path=checkpoint if resume else None, weights_only=True)
    trainer.save_checkpoint(checkpoint)
    return {name: value.clone() for name, value in module.state_dict().items()}


def main(recipe: str = "delayed", folder: str = "trainer-out/lightning") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    whole = train(recipe, Path(folder, "whole"), steps=10)
    train(recipe, Path(folder, "parts"), steps=5)
    resumed = train(recipe, Path(folder, "parts"), steps=10, resume=True)
    if whole.keys() != resumed.keys() or not all(torch.equal(whole[name], resumed[name]) for name in whole):
        sys.exit("the resumed run ended with other weights than the whole one")
    print(f"stopped after 5 steps and resumed: {len(whole)} tensors equal those of the uninterrupted run, bit for bit")
    print(f"statistics of every layer: {Path(folder, 'parts', 'fp8.jsonl')}, and tensorboard --logdir {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="delayed", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("folder", nargs="?", default="trainer-out/lightning", help="where it writes; emptied first")
    main(**vars(parser.parse_args()))
