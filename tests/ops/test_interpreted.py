"""The graphs that a GPU gets, through the operators' CUDA implementations, give the reference's training steps: without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PRODUCTS = {"scaled_mm", "rounded_mm"}
FUSED = {"norm_cast", "norm_backward", "act_linear", "act_backward_cast"}


@pytest.mark.parametrize("recipes", [["hybrid"], ["delayed", "direct", "rowwise", "blockwise"]])
def test_training_steps(recipes: list[str]) -> None:
    """Exponentials and sums differ in their last bit from torch's, and so some codes: 45 dB. FP8 itself leaves 20 to 30."""
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(script), *recipes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == set(recipes)
    for recipe, _, lowest, ran, *_ in lines:
        assert float(lowest) > 40, done.stdout
        operators = set(ran.split(","))
        assert operators >= FUSED or recipe in ("rowwise", "blockwise"), done.stdout
        assert operators & PRODUCTS, done.stdout
        assert operators & {"cast", "cast_current"}, done.stdout
