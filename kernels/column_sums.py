# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over the rows of a tensor, in two deterministic steps: bias gradients, and the gradients of a norm's weight and bias.

    partials[i, s, :] = sum over the rows of tile row i of x    by the kernel that has x in registers anyway, in float32
    out               = sum over i of partials[i, s, :]         by the kernel here, rounded once to out's dtype

One kernel may leave sums of several tensors: s counts the sets of them.

The partials are 1 / BLOCK_M of x's elements: a few percent of the traffic of the kernel that writes them. Reference:
`fp8fx.ops.linear.bias_gradient`; the order of the float32 sums differs, and is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import cdiv

_BLOCK_P, _BLOCK_K, _WARPS = 64, 32, 4


@triton.jit
def store_partial(sums_ptr, total, place, columns, BLOCK_M: tl.constexpr, SETS: tl.constexpr):
    """Sums of one tile, from `total`, float32 with BLOCK_K columns whose rows are still to be added. sums_ptr: of its set."""
    b, tile_m, _, M, K = place
    at = (b * tl.cdiv(M, BLOCK_M) + tile_m) * SETS * K + columns
    tl.store(sums_ptr + at, tl.sum(total, 0), mask=columns < K)


@triton.jit
def _column_sums_kernel(partials_ptr, out_ptr, other_ptr, P, K, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    which, sets = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    lines = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(0, P, BLOCK_P):
        at = ((start + lines).to(tl.int64) * sets + which)[:, None] * K + columns[None, :]
        total += tl.load(partials_ptr + at, mask=(start + lines < P)[:, None] & (columns < K)[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(out_ptr + columns, result.to(out_ptr.dtype.element_ty), mask=columns < K)
    else:
        tl.store(other_ptr + columns, result.to(other_ptr.dtype.element_ty), mask=columns < K)


def partials(like: Tensor, tile_rows: int, k: int, sets: int = 1) -> Tensor:
    """Room for the partial sums of `sets` tensors: float32 [tile rows, sets, K]."""
    return torch.empty((tile_rows, sets, k), dtype=torch.float32, device=like.device)


def sum_partials(parts: Tensor, out: Tensor, other: Tensor | None = None) -> None:
    """Write the sums of the first set of `parts` [P, sets, K] to `out` [K], and of the second to `other`."""
    p, sets, k = parts.shape
    grid = (cdiv(k, _BLOCK_K), sets)
    launch(
        _column_sums_kernel,
        grid,
        (parts, out, out if other is None else other, p, k),
        {"BLOCK_P": _BLOCK_P, "BLOCK_K": _BLOCK_K},
        num_warps=_WARPS,
    )


def check_sum(where: str, out: Tensor | None, k: int) -> None:
    if out is not None and (out.shape != (k,) or not out.is_contiguous() or not out.dtype.is_floating_point):
        raise KernelError(f"{where}: a gradient summed over the rows is a contiguous float [{k}], got {out.dtype} {tuple(out.shape)}")
