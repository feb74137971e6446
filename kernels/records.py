# mypy: allow-untyped-defs, allow-incomplete-defs
"""Records: what a casting kernel tells of the tensor x it cast, float32 in device memory that its owner zeroes.

    record[0] = max(record[0], amax(x))                    over the finite elements; an atomic max of the int32 bits
    record[1] += non-zero elements of x                    if counts are asked for, over a sample of x:
    record[2] += those of them whose code is zero          every 16th row of tiles, or all of fewer than 16

The shares record[2] / record[1] of samples estimate the underflow. A count below 2^24 is exact in float32; beyond, an addition of
one tile's count errs by half a unit in its last place. Nothing here depends on the order of the programs but that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.codes import finite_magnitude, largest_of

SAMPLE = tl.constexpr(16)


@triton.jit
def amax_bits(record_ptr):
    """The int32 bits of the amax recorded so far: what `merge_amax` wants read early."""
    return tl.load(record_ptr.to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def merge_amax(record_ptr, seen, value):
    """Atomic max of float32 `value` >= 0 into `record_ptr`, skipped where `seen`, its bits read before, is as large already."""
    # A stale `seen` is only ever too small, so it costs an atomic, never a result.
    bits = value.to(tl.int32, bitcast=True)
    tl.atomic_max(record_ptr.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask=bits > seen, sem="relaxed")


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
    return largest_of(tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3)))


@triton.jit
def count_zeros(record_ptr, x0, x1, x2, x3, c0, c1, c2, c3, place, BLOCK_M: tl.constexpr):
    """Add the counts of one tile to the record, if it is one of the sample. Outside of the matrix, x is 0."""
    _, tile_m, _, M, _ = place
    if (tl.cdiv(M, BLOCK_M) < SAMPLE) | (tile_m % SAMPLE == 0):
        n0, z0 = _counts(x0, c0)
        n1, z1 = _counts(x1, c1)
        n2, z2 = _counts(x2, c2)
        n3, z3 = _counts(x3, c3)
        # Both in one int32, 16 bits each: at most 4 per lane of [BLOCK_M / 4, BLOCK_K], and a tile has at most 2^15 elements.
        both = (n0 + n1 + n2 + n3) + ((z0 + z1 + z2 + z3) << 16)
        total = tl.sum(both, None)
        tl.atomic_add(record_ptr + 1, (total & 0xFFFF).to(tl.float32), sem="relaxed")
        tl.atomic_add(record_ptr + 2, (total >> 16).to(tl.float32), sem="relaxed")


@triton.jit
def _counts(x, codes):
    """int32 [...], 1 where x is not zero; and where its code is zero all the same."""
    nonzero = (x != 0.0).to(tl.int32)
    return nonzero, tl.where((codes & 0x7F) == 0, nonzero, 0)


def check_record(where: str, record: Tensor | None, amax: Tensor | None, counts: bool) -> tuple[Tensor | None, int]:
    """The record to write, and RECORD: 0 none, 1 amax, 2 amax and counts. `amax`, one element, is a record of amax alone."""
    if record is None:
        record, needed = amax, 1
        if counts:
            raise KernelError(f"{where}: counts are written to record[1] and record[2]: pass record")
    else:
        needed = 3 if counts else 1
        if amax is not None:
            raise KernelError(f"{where}: record[0] is the amax: pass record or amax, not both")
    if record is None:
        return None, 0
    if record.dtype != torch.float32 or record.numel() < needed or (needed == 3 and not record.is_contiguous()):
        raise KernelError(
            f"{where}: amax is float32 with one element, a record float32 [3] contiguous; got {record.dtype} {tuple(record.shape)}"
        )
    return record, 2 if counts else 1
