"""How launchers see tensors: any strided tensor as batches of matrices, and scales that follow its rows or columns. No Triton here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx.errors import KernelError

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AXES = {"tensor": 0, "row": 1, "column": 2}


def batches(x: Tensor) -> Tensor:
    """`x` as [B, M, K] without a copy where its strides allow: a scalar is [1, 1, 1], a vector [1, 1, K]."""
    if x.dim() < 2:
        return x.reshape(1, 1, x.numel())
    if x.dim() == 2:
        return x[None]
    return x if x.dim() == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def widest(x: Tensor) -> Tensor:
    """A contiguous `x` as [1, M, K] with long rows that are multiples of 16 bytes wide, if its size allows: for elementwise kernels."""
    for width in (4096, 512, 64):
        if x.numel() % width == 0:
            return x.view(1, -1, width)
    return batches(x)


def check_input(x: Tensor, where: str) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise KernelError(f"{where}: reads bfloat16, float16 and float32, got {x.dtype}: run the reference operator instead")


def axis_size(x: Tensor, granularity: str) -> int:
    """How many scales [B, M, K] `x` has."""
    count, rows, columns = x.shape
    return {"tensor": 1, "row": count * rows, "column": count * columns}[granularity]


def axis_shape(shape: torch.Size, granularity: str) -> list[int]:
    """The shape of the scale or amax of a tensor of `shape`: as `fp8fx.numerics.amax` gives it."""
    if granularity == "tensor":
        return []
    return [*shape[:-1], 1] if granularity == "row" else [*shape[:-2], 1, shape[-1]]


def transposed_shape(shape: torch.Size) -> list[int]:
    return [*shape[:-2], shape[-1], shape[-2]]
