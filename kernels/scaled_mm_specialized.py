# mypy: allow-untyped-defs, allow-incomplete-defs
"""The device code of scaled_mm whose warps have different work, in Gluon: what `scaled_mm_kernels` compute, where sums are added up outside
of the matrix unit.

    one warp                   brings tiles of A and B to a ring of buffers in shared memory, and waits for buffers that are free again
    two or three warpgroups    each multiply 64 rows of a tile of C, add up, finish and store them

The matrix unit then multiplies for one warpgroup while the other adds partial products to float32 registers, or finishes its rows. Where
all warps do the same at the same time, as Triton has them, it waits. Sums, scales and endings are those of `scaled_mm_kernels`, whose
layout of operands and walk over tiles this shares; C is stored by the copy engine only. Why Gluon: docs/decisions/0019.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8fx.kernels.random_bits import words
from fp8fx.kernels.scaled_mm_epilogue import ACT, STOCHASTIC, ended, rounded
from fp8fx.kernels.scaled_mm_kernels import locate
from fp8fx.kernels.scaled_mm_specialized_sums import ROWS, blocked_sums, halves, precise_sums

WIDTH = 64  # columns of a part of C that is finished and stored at once

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float8_e5m2: gl.float8e5,
}


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])


def described(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """What the kernel takes for a matrix of which the copy engine reads or writes blocks."""
    return TensorDescriptor(base, shape, strides, block, _layout(*block, base.dtype))


@gluon.jit
def _produce(
    a,
    b,
    beside_b,
    ring,
    sizes,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    BESIDE: gl.constexpr,
):
    """Bring the operands of every step as soon as their buffers are free; and the scales of B's columns, where each has its own."""
    left, right, full, empty, beside = ring
    batches, M, N, K, batch_rows_a, batch_rows_b = sizes
    STAGES: gl.constexpr = right.shape[0]
    BLOCK_N: gl.constexpr = right.shape[1]
    BLOCK_K: gl.constexpr = right.shape[2]
    BLOCK_M: gl.constexpr = WARPGROUPS * ROWS
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    turn = 0
    for tile in range(gl.program_id(0), batches * tiles_m * tiles_n, PROGRAMS):
        batch, tile_m, tile_n = locate(tile, tiles_m, tiles_n, GROUP)
        row_a, row_b = batch * batch_rows_a + tile_m * BLOCK_M, batch * batch_rows_b + tile_n * BLOCK_N
        for step in range(steps):
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)  # at first over: a new barrier counts as one round ahead
            mbarrier.expect(full.index(slot), (BLOCK_M + BLOCK_N) * BLOCK_K + (4 * BLOCK_N if BESIDE else 0))
            for who in gl.static_range(WARPGROUPS):
                room = left.index(slot * WARPGROUPS + who)
                tma.async_copy_global_to_shared(a, [row_a + who * ROWS, step * BLOCK_K], full.index(slot), room)
            tma.async_copy_global_to_shared(b, [row_b, step * BLOCK_K], full.index(slot), right.index(slot))
            if BESIDE:
                tma.async_copy_global_to_shared(beside_b, [step // BLOCKS[3], tile_n * BLOCK_N], full.index(slot), beside.index(slot))
            turn += 1


@gluon.jit
def _random_bits(random, batch, row, column, M, N, LAYOUT: gl.constexpr, WIDTH: gl.constexpr):
    """uint32 [ROWS, WIDTH], laid out as sums are: see `random_bits.random_tile`, GROUPED.

    Four neighbours share a block of random words; of sums, a thread holds pairs of neighbours, in rows eight apart. So each thread of a
    pair makes the words of one row, and they exchange a half.
    """
    LANES: gl.constexpr = [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout([[0, 2], [0, 4], [0, 8]], LANES, [[16, 0], [32, 0]], [], [ROWS, 16])
    rows = batch * M + row + gl.arange(0, ROWS, gl.SliceLayout(1, WORDS)).to(gl.int64)
    block = ((rows * N + column)[:, None] >> 2) + gl.arange(0, WIDTH // 4, gl.SliceLayout(0, WORDS))[None, :]
    w0, w1, w2, w3 = words(random, block)
    return gl.convert_layout(gl.join(gl.join(w0, w2), gl.join(w1, w3)).reshape(ROWS, WIDTH), LAYOUT)


@gluon.jit
def _finish(c, part, room, scales, ends, place, BLOCKED: gl.constexpr, PER_ROW: gl.constexpr, END: gl.constexpr):
    """Scale, finish and store a part of a warpgroup's sums; scales = (pointer to those of A, to those of B, what all share)."""
    batch, row, column, M, N = place
    scale_a_ptr, scale_b_ptr, whole = scales
    LAYOUT: gl.constexpr = part.type.layout
    rows, columns = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), column + gl.arange(0, part.shape[1], gl.SliceLayout(0, LAYOUT))
    if not BLOCKED:
        if not PER_ROW[0] or not PER_ROW[1]:
            part *= whole
        if PER_ROW[0]:
            part *= gl.load(scale_a_ptr + batch * M + rows, mask=rows < M, other=0.0)[:, None]
        if PER_ROW[1]:
            part *= gl.load(scale_b_ptr + batch * N + columns, mask=columns < N, other=0.0)[None, :]
    part = ended(part, rows, columns, ends, M, N, END)
    if END[STOCHASTIC]:
        bits = _random_bits((ends[3], ends[4]), batch.to(gl.int64), row, column, M, N, LAYOUT, part.shape[1])
    else:
        bits = part.to(gl.int32, bitcast=True)
    out = rounded(part, bits, ends, END, c.dtype)
    tma.store_wait(1)  # what was in `room`, two parts ago, has been read; all of the warpgroup meet after it
    room.store(out)
    fence_async_shared()
    tma.async_copy_shared_to_global(c, [batch * M + row, column], room)


@gluon.jit
def _consume(
    c,
    ring,
    room,
    scales,
    ends,
    sizes,
    strides,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    BLOCKED: gl.constexpr,
    PER_ROW: gl.constexpr,
    BLOCKS: gl.constexpr,
    BESIDE: gl.constexpr,
    END: gl.constexpr,
    WHO: gl.constexpr,
):
    """One warpgroup's rows of every tile of this program."""
    batches, M, N, K, _, _ = sizes
    scale_a_ptr, scale_b_ptr = scales
    BLOCK_N: gl.constexpr = ring[1].shape[1]
    BLOCK_K: gl.constexpr = ring[1].shape[2]
    WIDTH: gl.constexpr = room.shape[2]  # of a part that is finished at once
    tiles_m, tiles_n, steps = gl.cdiv(M, WARPGROUPS * ROWS), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    whole = 1.0
    if not BLOCKED:  # read early what the end of a tile needs
        if not PER_ROW[0]:
            whole *= gl.load(scale_a_ptr)
        if not PER_ROW[1]:
            whole *= gl.load(scale_b_ptr)
    finishing = (scale_a_ptr, scale_b_ptr, whole)
    turn = 0
    for tile in range(gl.program_id(0), batches * tiles_m * tiles_n, PROGRAMS):
        batch, tile_m, tile_n = locate(tile, tiles_m, tiles_n, GROUP)
        row, column = (WARPGROUPS * tile_m + WHO) * ROWS, BLOCK_N * tile_n
        if BLOCKED:
            place = (batch, row, column, M, N)
            left, right = halves(blocked_sums(ring, turn, steps, place, scales, strides, BLOCKS, BESIDE, WHO, WARPGROUPS))
        else:
            left, right = precise_sums(ring, turn, steps, WHO, WARPGROUPS)
        turn += steps
        PARTS: gl.constexpr = BLOCK_N // WIDTH
        if PARTS == 4:
            p0, p1 = halves(left)
            p2, p3 = halves(right)
        else:
            p0, p1 = left, right
        if END[STOCHASTIC] or END[ACT] >= 0:
            # A loop, so that the code of all warpgroups fits into the instruction cache: unrolled, it came anew for every tile.
            for i in range(PARTS):
                part = gl.where(i == 0, p0, p1)
                if PARTS == 4:
                    part = gl.where(i < 2, part, gl.where(i == 2, p2, p3))
                at = (batch, row, column + i * WIDTH, M, N)
                _finish(c, part, room.index(2 * WHO + i % 2), finishing, ends, at, BLOCKED, PER_ROW, END)
        else:
            parts = (p0, p1, p2, p3) if PARTS == 4 else (p0, p1)
            for i in gl.static_range(PARTS):
                at = (batch, row, column + i * WIDTH, M, N)
                _finish(c, parts[i], room.index(2 * WHO + i % 2), finishing, ends, at, BLOCKED, PER_ROW, END)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["key"])
def specialized_mm_kernel(
    a,
    b,
    c,
    scale_a_ptr,
    scale_b_ptr,
    bias_ptr,
    out_scale_ptr,
    record_ptr,
    rng_ptr,
    key,
    batches,
    M,
    N,
    K,
    batch_rows_a,
    batch_rows_b,
    beside_b,  # where BESIDE, a descriptor of the scales of B's columns, [blocks of K, N]
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bn,
    stride_bk,
    END: gl.constexpr,  # see `scaled_mm_epilogue`
    BLOCKED: gl.constexpr,  # or precise: see `scaled_mm_specialized_sums`
    PER_ROW: gl.constexpr,  # of A, of B: a scale for each row
    BLOCKS: gl.constexpr,  # rows of A, of B that share a scale; steps along K that do: see `scaled_mm_kernels`
    BESIDE: gl.constexpr,  # a block of B is one column; else as wide as a tile
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,  # 2 or 3, four warps each; the launch counts the first of them
):
    """C = A B^T with scales per tensor, row or block, finished as `scaled_mm_epilogue` says."""
    BLOCK_N: gl.constexpr = b.block_shape[0]
    BLOCK_K: gl.constexpr = b.block_shape[1]
    left = gl.allocate_shared_memory(a.dtype, [STAGES * WARPGROUPS, ROWS, BLOCK_K], a.layout)
    right = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    room = gl.allocate_shared_memory(c.dtype, [2 * WARPGROUPS, ROWS, c.block_shape[1]], c.layout)  # for two parts of each
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    beside = full  # nobody reads it
    if BESIDE:
        beside = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], beside_b.layout)
    ring = (left, right, full, empty, beside)
    sizes = (batches, M, N, K, batch_rows_a, batch_rows_b)
    scales, ends = (scale_a_ptr, scale_b_ptr), (bias_ptr, out_scale_ptr, record_ptr, rng_ptr, key)
    strides = (stride_ab, stride_am, stride_ak, stride_bb, stride_bn, stride_bk)
    # Registers of a thread, for those of the warpgroups after the first, and of the loading warp, which gives away what they need.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (c, ring, room, scales, ends, sizes, strides, GROUP, PROGRAMS, WARPGROUPS, BLOCKED, PER_ROW, BLOCKS, BESIDE, END, 0),
                ),
                (
                    _consume,
                    (c, ring, room, scales, ends, sizes, strides, GROUP, PROGRAMS, WARPGROUPS, BLOCKED, PER_ROW, BLOCKS, BESIDE, END, 1),
                ),
                (_produce, (a, b, beside_b, ring, sizes, GROUP, PROGRAMS, WARPGROUPS, BLOCKS, BESIDE)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (c, ring, room, scales, ends, sizes, strides, GROUP, PROGRAMS, WARPGROUPS, BLOCKED, PER_ROW, BLOCKS, BESIDE, END, 0),
                ),
                (
                    _consume,
                    (c, ring, room, scales, ends, sizes, strides, GROUP, PROGRAMS, WARPGROUPS, BLOCKED, PER_ROW, BLOCKS, BESIDE, END, 1),
                ),
                (
                    _consume,
                    (c, ring, room, scales, ends, sizes, strides, GROUP, PROGRAMS, WARPGROUPS, BLOCKED, PER_ROW, BLOCKS, BESIDE, END, 2),
                ),
                (_produce, (a, b, beside_b, ring, sizes, GROUP, PROGRAMS, WARPGROUPS, BLOCKS, BESIDE)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
