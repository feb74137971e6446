"""How launchers see tensors: any strided tensor as batches of matrices, and scales that follow its rows or columns. No Triton here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx.errors import KernelError

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AXES = {"tensor": 0, "row": 1, "column": 2}


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Triton's own takes microseconds, since it also serves its compiler."""
    return -(-a // b)


def ceil_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << (max(n, 1) - 1).bit_length()


class Matrices(NamedTuple):
    """A tensor as `batches` matrices [m, k]; strides by batch, row and column. `x` is the tensor to point at, whatever its shape."""

    x: Tensor
    batches: int
    m: int
    k: int
    strides: tuple[int, int, int]

    def tiles(self, block_m: int, block_k: int) -> int:
        return self.batches * cdiv(self.m, block_m) * cdiv(self.k, block_k)

    def tile_rows(self, block_m: int) -> int:
        return self.batches * cdiv(self.m, block_m)


def matrices(x: Tensor) -> Matrices:
    """`x` as batches of matrices, without a copy where its strides allow: a scalar is [1, 1, 1], a vector [1, 1, K]."""
    if x.dim() == 2:
        (m, k), (by_row, by_column) = x.shape, x.stride()
        return Matrices(x, 1, m, k, (0, by_row, by_column))
    if x.dim() < 2:
        x = x.reshape(1, 1, x.numel())
    elif x.dim() > 3:
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    (count, m, k), (by_batch, by_row, by_column) = x.shape, x.stride()
    return Matrices(x, count, m, k, (by_batch, by_row, by_column))


def plain_matrices(x: Tensor) -> Matrices:
    """The same with stride 1 along the rows: what is laid out otherwise is copied."""
    return matrices(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous())


def long_rows(x: Tensor) -> Matrices:
    """A contiguous `x` as one matrix with long rows that are multiples of 16 bytes wide, if its size allows: for elementwise kernels."""
    n = x.numel()
    for width in (4096, 512, 64):
        if n % width == 0:
            return Matrices(x, 1, n // width, width, (0, width, 1))
    return matrices(x)


def check_input(x: Tensor, where: str) -> None:
    if x.dtype not in INPUT_DTYPES:
        raise KernelError(f"{where}: reads bfloat16, float16 and float32, got {x.dtype}: run the reference operator instead")


def axis_size(x: Matrices, granularity: str) -> int:
    """How many scales x has."""
    return {"tensor": 1, "row": x.batches * x.m, "column": x.batches * x.k}[granularity]


def axis_shape(shape: torch.Size, granularity: str) -> list[int]:
    """The shape of the scale or amax of a tensor of `shape`: as `fp8fx.numerics.amax` gives it."""
    if granularity == "tensor":
        return []
    return [*shape[:-1], 1] if granularity == "row" else [*shape[:-2], 1, shape[-1]]


def pitch(m: int) -> int:
    """Bytes from one row of qT [K, M] to the next: `m`, padded to the 16 that wide stores, the copy engine and cuBLASLt ask for."""
    return (m + 15) // 16 * 16


def empty_transposed(shape: Sequence[int], dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """Room for qT [..., K, M] of a tensor of `shape` [..., M, K], on the device of `like`; strides (K * pitch, pitch, 1).

    Where M is no multiple of 16 it is a view that leaves out the padding, which the last row has too. `dtype` has one byte. The operators'
    fakes are made by this too: strides that differ from theirs would be wrong code under Inductor.
    """
    *batch, m, k = shape
    return like.new_empty((*batch, k, pitch(m)), dtype=dtype)[..., :m]
