"""How approximate may a multiplier be? A small network on scikit-learn's digits, evaluated under several arithmetics.

    python examples/approximate_multiplier.py

The network is trained in float32. Then the same weights run in E4M3 with other multipliers and accumulators, through a recipe's key
`arithmetic`; and once training goes on under the worst of them, straight through. Needs scikit-learn; some seconds on two cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fp8fx
from fp8fx.arithmetic import mitchell_table, register

# A multiplier of one's own: a table of significand products (1 + i/8)(1 + j/8). This one looks at the first mantissa bit only.
significand = 1 + torch.arange(8) // 4 * 0.5
register("one_bit", significand[:, None] * significand)
# Mitchell's, with the mean of its error given back: a constant factor.
s = 1 + torch.arange(8) / 8
register("mitchell_scaled", mitchell_table(3) * float((s[:, None] * s).mean() / mitchell_table(3).mean()))

STUDIES: dict[str, Any] = {
    "E4M3, exact products, float32 sums": "none",
    "Hopper's fast accumulation": {"accumulate": "hopper_fast"},
    "products in e5m2": {"products": "e5m2", "shift": -6},
    "sums in bfloat16": {"accumulate": "bfloat16"},
    "sums in e5m3": {"accumulate": "e5m3", "shift": -8},
    "Mitchell's multiplier": {"multiplier": "mitchell"},
    "Mitchell's, scaled": {"multiplier": "mitchell_scaled"},
    "one mantissa bit": {"multiplier": "one_bit"},
}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.arange(step * 100, step * 100 + 100) % len(y)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def recipe(arithmetic: Any) -> dict[str, Any]:
    return {"extends": "hybrid", "defaults": {"arithmetic": arithmetic}}


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor, exact: Tensor) -> str:
    """Accuracy, and the error of the logits against the float32 model."""
    out = model(x)
    sqnr = 20 * torch.log10(exact.norm() / (out - exact).norm())
    return f"{(out.argmax(1) == y).float().mean():8.2%} {sqnr:8.1f} dB"


def main() -> None:
    torch.manual_seed(0)
    x, y, test_x, test_y = data()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    train(model, x, y, 200)
    exact = model(test_x).detach()
    print(f"{'':36} accuracy     logits")
    print(f"{'float32':36} {(exact.argmax(1) == test_y).float().mean():8.2%}")
    for name, arithmetic in STUDIES.items():
        print(f"{name:36} {judge(fp8fx.compile(model, recipe(arithmetic)), test_x, test_y, exact)}")
    fast = fp8fx.compile(model, recipe(STUDIES["one mantissa bit"]))
    train(fast, x, y, 100)
    print(f"{'one mantissa bit, trained under it':36} {judge(fast, test_x, test_y, exact)}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    main()
