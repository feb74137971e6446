"""accelerate in FP8: a byte-level GPT on Python's own source text, stopped, resumed, and equal to the run that was not stopped.

python examples/train_with_accelerate.py [recipe]        recipe: delayed (default), direct, hybrid, ... or a path to a YAML file

Needs `pip install '.[trainers]'`. Takes half a minute on a CPU; everything it writes is in trainer-out/accelerate. The loop is the same
on several processes: accelerate launch examples/train_with_accelerate.py.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fp8fx
from fp8fx.demo.data import python_source
from fp8fx.demo.environment import mend_torchvision
from fp8fx.demo.models import GPT

if missing := [name for name in ("accelerate",) if importlib.util.find_spec(name) is None]:
    sys.exit(f"this example needs what is not installed: {', '.join(missing)}. Install it with  pip install '.[trainers]'")
mend_torchvision()
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, set_seed  # noqa: E402

from fp8fx.trainers.accelerate import separate_state, use_scaler  # noqa: E402

CONTEXT = 32
SOURCES = Path(asyncio.__file__).parent  # one package of the standard library is text enough here


def batches() -> DataLoader[tuple[Tensor, ...]]:
    tokens = python_source(SOURCES, 128 * (CONTEXT + 1), 4096).train.view(-1, CONTEXT + 1)
    return DataLoader(TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), batch_size=4, shuffle=True)


def train(recipe: str, folder: Path, steps: int, resume: bool = False, separate: bool = False) -> dict[str, Tensor]:
    """Train up to step `steps`, from the checkpoint in `folder` if `resume`, and save there. Returns the model's state_dict.

    separate: the checkpoint's model.safetensors holds the GPT's own tensors only, and the FP8 state lies in a file beside it.
    """
    set_seed(0)
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)  # the same one after resuming
    accelerator = Accelerator(cpu=True, dataloader_config=order)
    use_scaler(accelerator, fp8fx.GradScaler(recipe, device="cpu"))  # a pass-through for recipes that need no loss scaling
    fast = fp8fx.compile(GPT(width=32, layers=2, heads=2, context=CONTEXT), recipe)
    if separate:
        separate_state(accelerator, fast)
    model, optimizer, loader = accelerator.prepare(fast, torch.optim.AdamW(fast.parameters(), lr=3e-3), batches())
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = int((folder / "steps").read_text())
    statistics = fp8fx.Statistics(fast, jsonl=folder / "fp8.jsonl", every=5, start=done) if accelerator.is_main_process else None
    for inputs, targets in accelerator.skip_first_batches(loader, done):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        if statistics is not None:
            statistics.step()
        if done % 5 == 0:
            accelerator.print(f"step {done:3}  loss {loss.item():.4f}")
        if done == steps:
            break
    if statistics is not None:
        statistics.close()
    accelerator.save_state(str(folder))
    (folder / "steps").write_text(str(done))
    saved = {name: value.clone() for name, value in fast.state_dict().items()}
    accelerator.free_memory()
    return saved


def main(recipe: str = "delayed", folder: str = "trainer-out/accelerate") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    whole = train(recipe, Path(folder, "whole"), steps=10)
    for form, separate in (("in model.safetensors", False), ("in a file of its own", True)):
        train(recipe, Path(folder, "parts"), steps=5, separate=separate)
        resumed = train(recipe, Path(folder, "parts"), steps=10, resume=True, separate=separate)
        if whole.keys() != resumed.keys() or not all(torch.equal(whole[name], resumed[name]) for name in whole):
            sys.exit(f"the resumed run, FP8 state {form}, ended with other weights than the whole one")
        print(f"stopped and resumed, FP8 state {form}: {len(whole)} tensors equal those of the uninterrupted run, bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="delayed", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("folder", nargs="?", default="trainer-out/accelerate", help="where it writes; emptied first")
    main(**vars(parser.parse_args()))
