"""The new process of test_calibrate.py: load, run in evaluation, write the outputs and the scales.

python -P tests/checkpoint/calibrated.py CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fp8fx


def make(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def batch(seed: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def evaluate(fast: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = {
            f"y{seed}": fast(5.0**seed * batch(seed)) for seed in range(3)
        }  # larger than anything calibrated: scales must not follow
    return outputs | {key: value.clone() for key, value in fp8fx.state_dict(fast).items()}


if __name__ == "__main__":
    loaded = fp8fx.compile(make(1).eval(), "delayed")
    fp8fx.load(sys.argv[1], loaded)
    save_file(evaluate(loaded), sys.argv[2])
