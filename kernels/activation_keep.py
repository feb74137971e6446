# mypy: allow-untyped-defs, allow-incomplete-defs
"""activation_keep: an activation in place, with the codes of its inputs, in one read of them.

    a  = act(h) * u, or act(h)     over h, in h's dtype
    kept h, kept u                 their codes and scales (`Kept`)
    amax                           of a, in partial amaxes: what `cast(..., from_amax=True)` makes the scale of a from

Current scaling reads h and u twice: for the amax, then for the codes. Where codes of h and u are kept too, a takes h's place between the
two, and u is free before the codes of a are made: as many bytes are moved, and 6 per element of a are alive in place of 8.

Reference: `fp8fx.ops.act`, whose codes and scales of h and u are equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.activations import ACTIVATIONS, Kept, check_operands, forward, keep
from fp8fx.kernels.amax import part_count
from fp8fx.kernels.codes import finite_magnitude, largest_of
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import matrices
from fp8fx.kernels.quarters import locate_tile

_CONFIG = (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps


@triton.jit
def _activation_keep_kernel(
    h_ptr,
    u_ptr,
    kept_h_ptr,
    kept_u_ptr,
    block_h_ptr,
    block_u_ptr,
    amax_ptr,
    tiles,
    M,
    K,
    WHAT: tl.constexpr,  # as `activations` says
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    strides = (0, K, 1), (0, K, 1), (0, K, 1)
    inputs = (h_ptr, h_ptr, u_ptr, block_h_ptr, block_u_ptr)
    largest = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    pid = tl.program_id(0)
    for i in range(pid, tiles, PARTS):
        place, _, _, columns = locate_tile(tiles - 1 - i, M, K, BLOCK_M, BLOCK_K)
        rows = place[1] * BLOCK_M + tl.arange(0, BLOCK_M)
        y, h, u = forward(inputs, strides, place, rows, columns, WHAT)
        keep(h, kept_h_ptr, block_h_ptr, place, rows, columns)
        if WHAT[1]:
            keep(u, kept_u_ptr, block_u_ptr, place, rows, columns)
        at = rows.to(tl.int64)[:, None] * K + columns[None, :]
        tl.store(h_ptr + at, y.to(h_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])
        largest = tl.maximum(largest, finite_magnitude(y))
    tl.store(amax_ptr + pid, largest_of(largest))


def activation_keep(h: Tensor, u: Tensor | None, activation: str, kept: tuple[Kept, Kept | None]) -> Tensor:
    """Write act(h) * u over h, and the codes of both to `kept`; the partial amaxes of the result, float32 [PARTS].

    h and u: bf16, fp16 or fp32 [M, K], contiguous. Raises KernelError for others.
    """
    check_operands("activation_keep", None, h, u, activation)
    if h.dim() != 2 or not h.is_contiguous() or (u is not None and not u.is_contiguous()) or (u is None) != (kept[1] is None):
        raise KernelError("activation_keep: h and u must be contiguous matrices, with room for the codes of each")
    block_m, block_k, warps = _CONFIG
    seen = matrices(h)
    tiles = seen.tiles(block_m, block_k)
    parts = torch.empty(part_count(tiles), dtype=torch.float32, device=h.device)
    if h.numel() == 0:
        return parts.zero_()
    other = kept[0] if kept[1] is None else kept[1]
    launch(
        _activation_keep_kernel,
        (parts.numel(),),
        (h, h if u is None else u, kept[0].q, other.q, kept[0].scale, other.scale, parts, tiles, seen.m, seen.k),
        {
            "WHAT": (ACTIVATIONS[activation], u is not None, False, False),
            "PARTS": parts.numel(),
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    return parts
