# mypy: allow-untyped-defs, allow-incomplete-defs
"""amax = max |x| over the finite elements, of a tensor, per row, per column, or per row and per column in one read of x.

    amax        x [..., M, K] any strides -> float32 [], [..., M, 1], [..., 1, K]; 0 where nothing is finite
    amax_parts  the same of a tensor, left as PARTS partial ones for the kernel that reads them: no memory to zero, no atomics

Each program reduces a tile and merges it with an atomic max of the int32 bits, which order as magnitudes do: the result does
not depend on the order of the programs. `amax_parts` walks from the end of x to its start, so that the cast which follows finds the
start of x in the L2 cache. Reference: `fp8fx.numerics.amax`, equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.codes import magnitude_of, ordered
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import AXES, Matrices, axis_shape, axis_size, cdiv, ceil_power_of_two, check_input, long_rows, matrices
from fp8fx.kernels.records import amax_bits, merge_amax

# BLOCK_M, BLOCK_K, num_warps
_TILE = (64, 128, 4)
_AXES = (128, 64, 4)  # by rows and by columns at once
_FLAT = (4, 4096, 8)
_PARTS_FLAT = (2, 4096, 8)

# Programs of a kernel that walks over a whole tensor and leaves one partial amax each: almost eight per multiprocessor.
MOST_PARTS = 1024


@triton.jit
def _amax_kernel(
    x_ptr,
    amax_ptr,
    row_ptr,
    column_ptr,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_xk,
    TENSOR: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    order, b, rows, columns = _tile(tl.program_id(0), x_ptr, M, K, stride_xb, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
    if ROW:
        largest = magnitude_of(tl.max(order, 1)).to(tl.int32, bitcast=True)
        tl.atomic_max(row_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + b * M + rows, largest, mask=rows < M, sem="relaxed")
    if COLUMN:
        largest = magnitude_of(tl.max(order, 0)).to(tl.int32, bitcast=True)
        tl.atomic_max(column_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + b * K + columns, largest, mask=columns < K, sem="relaxed")
    if TENSOR:
        merge_amax(amax_ptr, amax_bits(amax_ptr), magnitude_of(tl.max(order, None)))


@triton.jit
def _tile(tile, x_ptr, M, K, stride_xb, stride_xm, stride_xk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a tile `ordered(x)`, its batch, rows and columns."""
    tiles_k, tiles_m = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    b = (tile // (tiles_k * tiles_m)).to(tl.int64)
    rows = (tile // tiles_k) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = b * stride_xb + rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    return ordered(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)), b, rows, columns


@triton.jit
def _amax_parts_kernel(
    x_ptr,
    parts_ptr,
    tiles,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_xk,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    largest = tl.zeros([BLOCK_M, BLOCK_K], tl.uint32)
    for i in range(tl.program_id(0), tiles, PARTS):
        order, _, _, _ = _tile(tiles - 1 - i, x_ptr, M, K, stride_xb, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        largest = tl.maximum(largest, order)
    tl.store(parts_ptr + tl.program_id(0), magnitude_of(tl.max(largest, None)))


def amax(x: Tensor, granularity: str = "tensor") -> Tensor:
    """float32 amax of bf16, fp16 or fp32 `x` [..., M, K]; granularity `tensor`, `row` (over K) or `column` (over M)."""
    return amax_each(x, (granularity,))[0]


def amax_each(x: Tensor, granularities: tuple[str, ...]) -> list[Tensor]:
    """`amax` of x by each of several granularities, in one read of x."""
    check_input(x, "amax")
    if unknown := set(granularities) - set(AXES):
        raise KernelError(f"amax: unknown granularity {sorted(unknown)[0]!r}; allowed: tensor, row or column")
    seen = long_rows(x) if granularities == ("tensor",) and x.is_contiguous() else matrices(x)
    sizes = [axis_size(seen, g) for g in granularities]
    # Compilers ask that a tensor starts on a multiple of 16 bytes.
    room = [4 * cdiv(size, 4) for size in sizes]
    zeros = torch.zeros(sum(room), dtype=torch.float32, device=x.device).split(room)
    found = [part[:size] for part, size in zip(zeros, sizes, strict=True)]
    if x.numel() > 0:
        by = dict(zip(granularities, found, strict=True))
        flat = seen.k == 4096 and granularities == ("tensor",)
        block_m, block_k, warps = _FLAT if flat else _AXES if {"row", "column"} <= by.keys() else _TILE
        launch(
            _amax_kernel,
            (seen.tiles(block_m, block_k),),
            (seen.x, *(by.get(g, found[0]) for g in AXES), seen.m, seen.k, *seen.strides),
            {"TENSOR": "tensor" in by, "ROW": "row" in by, "COLUMN": "column" in by, "BLOCK_M": block_m, "BLOCK_K": block_k},
            num_warps=warps,
        )
    return [part.view(axis_shape(x.shape, g)) for part, g in zip(found, granularities, strict=True)]


def part_count(tiles: int) -> int:
    """How many partial amaxes the programs that share `tiles` tiles leave: a power of two."""
    return min(MOST_PARTS, ceil_power_of_two(tiles))


def amax_parts(x: Tensor) -> Tensor:
    """float32 [PARTS], the largest of which is amax(x); x bf16, fp16 or fp32, any strides. `cast(..., from_amax=True)` reads it."""
    check_input(x, "amax")
    seen: Matrices = long_rows(x) if x.is_contiguous() else matrices(x)
    block_m, block_k, warps = _PARTS_FLAT if x.is_contiguous() and seen.k == 4096 else _TILE
    tiles = seen.tiles(block_m, block_k)
    parts = torch.empty(part_count(tiles), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return parts.zero_()
    launch(
        _amax_parts_kernel,
        (parts.numel(),),
        (seen.x, parts, tiles, seen.m, seen.k, *seen.strides),
        {"PARTS": parts.numel(), "BLOCK_M": block_m, "BLOCK_K": block_k},
        num_warps=warps,
    )
    return parts
