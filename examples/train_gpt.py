"""Train the demo's byte-level GPT in FP8: one line more than in plain PyTorch, two with a loss scaler.

python examples/train_gpt.py [recipe] [steps]        recipe: none, hybrid (default), direct, or a path to a YAML file
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import fp8fx
from fp8fx.demo.data import python_source, text_batches
from fp8fx.demo.models import GPT


def main(recipe: str = "hybrid", steps: int = 200) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(width=128, layers=2, context=64).to(device)

    fast = fp8fx.compile(model, recipe=recipe)  # the same Parameters as `model`
    scaler = fp8fx.GradScaler(recipe=recipe, device=device)  # passes everything through where the recipe needs no scaling

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, (inputs, targets) in enumerate(text_batches(python_source().train, 8, 64, steps, seed=0)):
        logits = fast(inputs.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 20 == 0:
            print(f"step {step:4}  loss {loss.item():.4f}")
    print(fast.plan())


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="hybrid", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("steps", nargs="?", type=count, default=200, help="how many, from 1 on")
    main(**vars(parser.parse_args()))
