"""Train a small ResNet on handwritten digits in FP8, with its first convolution and its classifier left in high precision.

python examples/train_resnet.py [recipe] [steps]        needs scikit-learn: pip install 'fp8fx[demo]'
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import fp8fx
from fp8fx.demo.data import digits, picture_batches
from fp8fx.demo.models import DigitsResNet


def main(recipe: str = "hybrid", steps: int = 100) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = digits()
    model = DigitsResNet().to(device)

    fast = fp8fx.compile(model, recipe=recipe, exempt=["conv1", "fc"])
    scaler = fp8fx.GradScaler(recipe=recipe, device=device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, (inputs, labels) in enumerate(picture_batches(pictures, 64, steps, seed=0)):
        loss = F.cross_entropy(fast(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 20 == 0:
            print(f"step {step:4}  loss {loss.item():.4f}")

    fast.eval()
    with torch.no_grad():
        right = fast(pictures.held_out.to(device)).argmax(1).cpu() == pictures.held_out_labels
    print(f"held-out accuracy {right.float().mean().item():.2%}")
    print(fast.plan())


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="hybrid", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("steps", nargs="?", type=count, default=100, help="how many, from 1 on")
    main(**vars(parser.parse_args()))
