"""Look at the plan, train in FP8, compare with high precision, save. Takes a few seconds on a CPU.

python examples/quickstart.py [recipe]        recipe: hybrid (default), direct, none, or a path to a YAML file
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import fp8fx


def main(recipe: str = "hybrid") -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    x = torch.randn(512, 64)
    labels = (x @ torch.randn(64, 10)).argmax(-1)  # something that can be learned
    print(fp8fx.plan(model, recipe, example_inputs=x))

    fast = fp8fx.compile(model, recipe)  # model itself stays in high precision, and shares its parameters with fast
    scaler = fp8fx.GradScaler(recipe)  # a pass-through where the recipe needs no loss scaling
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        loss = F.cross_entropy(fast(x), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 10 == 9:
            print(f"step {step + 1:3}  loss {loss.item():.4f}")

    with torch.no_grad():
        print(f"loss in FP8 {F.cross_entropy(fast(x), labels):.4f}, in high precision {F.cross_entropy(model(x), labels):.4f}")
    saved = fp8fx.strip(fast.state_dict())  # exactly the original model's keys
    print(f"{len(saved)} tensors to save: {', '.join(saved)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="hybrid", help="a shipped recipe's name, or the path of a YAML file")
    main(**vars(parser.parse_args()))
