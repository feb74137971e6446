"""transformers.Trainer in FP8: a tiny Llama on Python's own source text, stopped, resumed, and equal to the run that was not stopped.

python examples/train_with_transformers.py [recipe]        recipe: delayed (default), direct, hybrid, ... or a path to a YAML file

Needs `pip install '.[trainers]'`. Takes half a minute on a CPU; everything it writes is in trainer-out/transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fp8fx
from fp8fx.demo.data import python_source
from fp8fx.demo.environment import mend_torchvision

if missing := [name for name in ("transformers", "accelerate", "tensorboard") if importlib.util.find_spec(name) is None]:
    sys.exit(f"this example needs what is not installed: {', '.join(missing)}. Install it with  pip install '.[trainers]'")
mend_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed  # noqa: E402

from fp8fx.trainers.transformers import StatisticsCallback, use_scaler  # noqa: E402

CONTEXT = 32
SOURCES = Path(asyncio.__file__).parent  # one package of the standard library is text enough here


class Windows(Dataset[dict[str, Tensor]]):
    """The bytes of the standard library's sources, in pieces of CONTEXT."""

    def __init__(self) -> None:
        self.tokens = python_source(SOURCES, 256 * CONTEXT, 4096).train

    def __len__(self) -> int:
        return len(self.tokens) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.tokens[index * CONTEXT : (index + 1) * CONTEXT]
        return {"input_ids": piece, "labels": piece}


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, tie_word_embeddings=True, **sizes))


def train(recipe: str, folder: Path, steps: int, resume: bool = False, statistics_every: int = 5) -> dict[str, Tensor]:
    """Train up to step `steps`, from the last checkpoint in `folder` if `resume`. Returns the model's state_dict."""
    set_seed(0)
    fast = fp8fx.compile(tiny_llama(), recipe)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=5, logging_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, lr_scheduler_type="constant", max_grad_norm=1.0, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    statistics = StatisticsCallback(jsonl=folder / "fp8.jsonl", tensorboard=folder / "tensorboard", every=statistics_every)
    trainer = Trainer(model=fast, args=arguments, train_dataset=Windows(), callbacks=[statistics])
    use_scaler(trainer, fp8fx.GradScaler(recipe))  # a pass-through for recipes that need no loss scaling
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in fast.state_dict().items()}


def main(recipe: str = "delayed", folder: str = "trainer-out/transformers") -> None:
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
    parser.add_argument("folder", nargs="?", default="trainer-out/transformers", help="where it writes; emptied first")
    main(**vars(parser.parse_args()))
