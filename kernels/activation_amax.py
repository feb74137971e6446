# mypy: allow-untyped-defs, allow-incomplete-defs
"""The amax of what an activation or its backward would write, without writing it: the first pass of current scaling.

    activation_amax            amax(act(h) * u)
    activation_backward_amax   amax(dh), amax(du)

Some hundred programs walk over the tensors, from their end to their start, so that the cast which follows finds the start in the L2
cache. They leave partial amaxes, float32 [PARTS], no memory to zero and no atomics; or merge theirs into an amax that the caller gives,
and zeroed. Either is what `activation_cast(..., from_amax=True)` makes its scale from. The values are those that it
casts, to the bit. Reference: `fp8fx.numerics.amax` of what the reference of `activation_cast` makes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.activations import ACTIVATIONS, Kept, backward, check_operands, forward, pointers, values
from fp8fx.kernels.amax import part_count
from fp8fx.kernels.codes import finite_magnitude, largest_of
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import plain_matrices
from fp8fx.kernels.quarters import locate_tile
from fp8fx.kernels.records import amax_bits, check_record, merge_amax

_FORWARD, _BACKWARD = (16, 128, 4), (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps


@triton.jit
def _activation_amax_kernel(
    dy_ptr,
    h_ptr,
    u_ptr,
    amax_ptr,
    amax_u_ptr,
    tiles,
    M,
    K,
    stride_db,
    stride_dm,
    stride_hb,
    stride_hm,
    stride_ub,
    stride_um,
    block_h_ptr,
    block_u_ptr,
    BACKWARD: tl.constexpr,
    WHAT: tl.constexpr,  # as `activations` says
    MERGE: tl.constexpr,  # into one amax, not parts
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    strides = (stride_db, stride_dm, 1), (stride_hb, stride_hm, 1), (stride_ub, stride_um, 1)
    inputs = (dy_ptr, h_ptr, u_ptr, block_h_ptr, block_u_ptr)
    largest = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    largest_u = largest
    pid = tl.program_id(0)
    for i in range(pid, tiles, PARTS):
        place, _, _, columns = locate_tile(tiles - 1 - i, M, K, BLOCK_M, BLOCK_K)
        rows = place[1] * BLOCK_M + tl.arange(0, BLOCK_M)
        if BACKWARD:
            y, du = backward(inputs, strides, place, rows, columns, WHAT)
            if WHAT[1]:
                largest_u = tl.maximum(largest_u, finite_magnitude(du))
        else:
            y, _, _ = forward(inputs, strides, place, rows, columns, WHAT)
        largest = tl.maximum(largest, finite_magnitude(y))
    _leave(amax_ptr, largest, pid, MERGE)
    if BACKWARD and WHAT[1]:
        _leave(amax_u_ptr, largest_u, pid, MERGE)


@triton.jit
def _leave(amax_ptr, largest, pid, MERGE: tl.constexpr):
    value = largest_of(largest)
    if MERGE:
        merge_amax(amax_ptr, amax_bits(amax_ptr), value)
    else:
        tl.store(amax_ptr + pid, value)


def activation_amax(h: Tensor, u: Tensor | None, activation: str, amax: Tensor | None = None) -> Tensor:
    """The amax of act(h) or act(h) * u; h and u bf16, fp16 or fp32 [..., M, K].

    amax: float32 with one element, raised to it and returned; None: partial amaxes, float32 [PARTS], are returned.
    """
    return _measure(None, h, u, activation, amax, None)[0]


def activation_backward_amax(
    dy: Tensor, h: Tensor | Kept, u: Tensor | Kept | None, activation: str, amax: Tensor | None = None, amax_u: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The amaxes of dh and du, the second None where u is None; each as `activation_amax` returns it, both given or none."""
    return _measure(dy, h, u, activation, amax, amax_u)


def _measure(
    dy: Tensor | None, h: Tensor | Kept, u: Tensor | Kept | None, activation: str, amax: Tensor | None, amax_u: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    two = dy is not None and u is not None
    first = check_operands("activation_amax", dy, h, u, activation)
    if two and (amax is None) != (amax_u is None):
        raise KernelError("activation_backward_amax: the amaxes of dh and du are given together")
    seen = [plain_matrices(first if x is None else x) for x in (dy, values(h), values(u))]
    block_m, block_k, warps = _FORWARD if dy is None else _BACKWARD
    tiles = seen[1].tiles(block_m, block_k)
    parts = part_count(tiles)
    if amax is None:
        made = torch.empty((2 if two else 1, parts), dtype=torch.float32, device=first.device)
        into = (made[0], made[1] if two else None)
    else:
        check_record("activation_amax", None, amax, False)
        check_record("activation_amax", None, amax_u, False)
        into = (amax, amax_u if two else None)
    if first.numel() == 0:
        return (into[0], into[1]) if amax is not None else (into[0].zero_(), None if into[1] is None else into[1].zero_())
    launch(
        _activation_amax_kernel,
        (parts,),
        (
            *(x.x for x in seen),
            into[0],
            into[0] if into[1] is None else into[1],
            tiles,
            seen[1].m,
            seen[1].k,
            *(stride for x in seen for stride in x.strides[:2]),
            *pointers(first, h, u),
        ),
        {
            "BACKWARD": dy is not None,
            "WHAT": (ACTIVATIONS[activation], u is not None, isinstance(h, Kept), isinstance(u, Kept)),
            "MERGE": amax is not None,
            "PARTS": parts,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    return into[0], into[1]
