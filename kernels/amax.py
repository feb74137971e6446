# mypy: allow-untyped-defs, allow-incomplete-defs
"""amax = max |x| over the finite elements, of a tensor, per row, per column, or per row and per column in one read of x.

    x [..., M, K] any strides -> float32 [], [..., M, 1], [..., 1, K]; 0 where nothing is finite

Each program reduces a tile and merges it with an atomic max of the int32 bits, which order as magnitudes do: the result does
not depend on the order of the programs. Reference: `fp8fx.numerics.amax`, equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.codes import finite_magnitude
from fp8fx.kernels.layout import AXES, axis_shape, axis_size, batches, check_input, widest

# BLOCK_M, BLOCK_K, num_warps
_TILE = (64, 128, 4)
_FLAT = (4, 4096, 8)


@triton.jit
def merge_amax(amax_ptr, seen, value):
    """Atomic max of float32 `value` >= 0 into `amax_ptr` (int32), skipped where `seen`, read there before, is as large already."""
    # A stale `seen` is only ever too small, so it costs an atomic, never a result.
    bits = value.to(tl.int32, bitcast=True)
    tl.atomic_max(amax_ptr, bits, mask=bits > seen, sem="relaxed")


@triton.jit
def amax_of(x0, x1, x2, x3):
    """max |x| over the finite elements of the quarters; a scalar."""
    # The plain maximum costs one instruction per element. A NaN may or may not get lost in it, so the tile is looked at again if the
    # result is not finite; if it is, a NaN that got lost does not count anyway.
    largest = _max_of(tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3))
    if not largest < float("inf"):
        largest = _max_of(finite_magnitude(x0), finite_magnitude(x1), finite_magnitude(x2), finite_magnitude(x3))
    return largest


@triton.jit
def _max_of(a0, a1, a2, a3):
    return tl.max(tl.max(tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3)), 1), 0)


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
    tiles_k, tiles_m = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // (tiles_k * tiles_m)).to(tl.int64)
    rows = (pid // tiles_k) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = b * stride_xb + rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    seen = tl.load(amax_ptr)
    magnitude = finite_magnitude(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32))
    if ROW:
        largest = tl.max(magnitude, 1).to(tl.int32, bitcast=True)
        tl.atomic_max(row_ptr + b * M + rows, largest, mask=rows < M, sem="relaxed")
    if COLUMN:
        largest = tl.max(magnitude, 0).to(tl.int32, bitcast=True)
        tl.atomic_max(column_ptr + b * K + columns, largest, mask=columns < K, sem="relaxed")
    if TENSOR:
        merge_amax(amax_ptr, seen, tl.max(tl.max(magnitude, 1), 0))


def amax(x: Tensor, granularity: str = "tensor") -> Tensor:
    """float32 amax of bf16, fp16 or fp32 `x` [..., M, K]; granularity `tensor`, `row` (over K) or `column` (over M)."""
    return amax_each(x, (granularity,))[0]


def amax_each(x: Tensor, granularities: tuple[str, ...]) -> list[Tensor]:
    """`amax` of x by each of several granularities, in one read of x."""
    check_input(x, "amax")
    if unknown := set(granularities) - set(AXES):
        raise KernelError(f"amax: unknown granularity {sorted(unknown)[0]!r}; allowed: tensor, row or column")
    flat = granularities == ("tensor",) and x.is_contiguous()
    grid_x = widest(x) if flat else batches(x)
    found = {g: torch.zeros(axis_size(grid_x, g), dtype=torch.int32, device=x.device) for g in granularities}
    if x.numel() > 0:
        anything = next(iter(found.values()))
        block_m, block_k, warps = _FLAT if flat and grid_x.shape[-1] == 4096 else _TILE
        count, m, k = grid_x.shape
        _amax_kernel[(count * triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
            grid_x,
            *(found.get(g, anything) for g in AXES),
            m,
            k,
            *grid_x.stride(),
            TENSOR="tensor" in found,
            ROW="row" in found,
            COLUMN="column" in found,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=warps,
        )
    return [found[g].view(torch.float32).view(axis_shape(x.shape, g)) for g in granularities]
