"""`fp8fx.coverage` with an independent judge: an operand is FP8 if every element survives a round trip through ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from fp8fx import coverage
from fp8fx.coverage import Coverage, plain_flops

__all__ = ["Coverage", "CoverageMeter", "grid", "plain_flops"]

GRIDS = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def grid(x: Tensor) -> str:
    """The first FP8 grid that holds every element of `x`, or "" if none does. NaN is on both."""
    values = x.detach().to(torch.float32).numpy()
    for name, kind in GRIDS.items():
        with np.errstate(all="ignore"):
            if np.array_equal(values.astype(kind).astype(np.float32), values, equal_nan=True):
                return name
    return ""


class CoverageMeter(coverage.CoverageMeter):
    def __init__(self) -> None:
        super().__init__(grid)
