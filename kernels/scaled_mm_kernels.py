# mypy: allow-untyped-defs, allow-incomplete-defs
"""The device code of scaled_mm: two persistent GEMMs whose operand tiles the copy engine (TMA) brings to shared memory.

One program per multiprocessor walks over the tiles of C, in groups of GROUP tile rows so that operands are found in the L2
cache again. A [Ba * M, K] and B [Bb * N, K] are both K-major, batches stacked along the rows; a tile that reaches into the next
batch reads rows it will not store. What lies beyond K is filled with zeros by the copy engine. See `scaled_mm` for the formula.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.scaled_mm_epilogue import finish


@triton.jit
def locate(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(batch, tile row, tile column) of the tile with this number."""
    per_batch = tiles_m * tiles_n
    batch, within = tile // per_batch, tile % per_batch
    per_group = GROUP * tiles_n
    first = within // per_group * GROUP
    height = min(tiles_m - first, GROUP)
    return batch, first + within % per_group % height, within % per_group // height


@triton.jit(do_not_specialize=["key"])
def scaled_mm_kernel(
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
    stride_cb,
    stride_cm,
    stride_cn,
    ROW_A: tl.constexpr,
    ROW_B: tl.constexpr,
    END: tl.constexpr,  # see `scaled_mm_epilogue`
    TMA_STORE: tl.constexpr,
    PARTS: tl.constexpr,  # in which a tile is finished
    DTYPE: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """C = (A B^T) scaled per tensor or per row of A and of B, finished as `scaled_mm_epilogue` says."""
    tl.assume(K > 0)  # or the end of a tile is compiled once more, for sums of nothing
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tiles = batches * tiles_m * tiles_n
    # Read early what the end of a tile needs: there, the matrix unit would wait for it.
    whole = 1.0
    if not ROW_A:
        whole *= tl.load(scale_a_ptr)
    if not ROW_B:
        whole *= tl.load(scale_b_ptr)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        batch, tile_m, tile_n = locate(tile, tiles_m, tiles_n, GROUP)
        row_a, row_b = batch * batch_rows_a + tile_m * BLOCK_M, batch * batch_rows_b + tile_n * BLOCK_N
        rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            left, right = a.load([row_a, step * BLOCK_K]), b.load([row_b, step * BLOCK_K])
            # Hopper aligns the terms of each addition to the largest and keeps 13 bits below it; PRECISE adds what it has to float32
            # registers every BLOCK_K.
            acc = tl.dot(left, right.T, acc, max_num_imprecise_acc=BLOCK_K if PRECISE else None)

        if ROW_A:
            scale_a = tl.load(scale_a_ptr + batch * M + rows, mask=rows < M, other=0.0)
        if ROW_B:
            scale_b = tl.load(scale_b_ptr + batch * N + columns, mask=columns < N, other=0.0)
        if not ROW_A or not ROW_B:
            acc *= whole
        if ROW_A:
            acc *= scale_a[:, None]
        if ROW_B:
            acc *= scale_b[None, :]
        place = (batch, tile_m * BLOCK_M, M, N)
        strides = (stride_cb, stride_cm, stride_cn)
        ends = (bias_ptr, out_scale_ptr, record_ptr, rng_ptr, key)
        finish(c, acc, ends, place, tile_n * BLOCK_N, strides, END, TMA_STORE, DTYPE, PARTS)


@triton.jit(do_not_specialize=["key"])
def blocked_mm_kernel(
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
    stride_cb,
    stride_cm,
    stride_cn,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bn,
    stride_bk,
    BLOCK_ROWS_A: tl.constexpr,  # rows of A that share a scale; strides of 0 stand for fewer scales
    BLOCK_ROWS_B: tl.constexpr,
    STEPS_A: tl.constexpr,  # BLOCK_K steps that share a scale
    STEPS_B: tl.constexpr,
    END: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PARTS: tl.constexpr,  # in which a tile is finished
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """C = sum over blocks of K of (A B^T) * scale_a * scale_b, each partial product scaled before it is added; finished likewise."""
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tiles = batches * tiles_m * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        batch, tile_m, tile_n = locate(tile, tiles_m, tiles_n, GROUP)
        row_a, row_b = batch * batch_rows_a + tile_m * BLOCK_M, batch * batch_rows_b + tile_n * BLOCK_N
        rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        from_a = scale_a_ptr + batch * stride_ab + rows // BLOCK_ROWS_A * stride_am
        # One scale of B for the whole tile where its blocks are as wide.
        UNIFORM_B: tl.constexpr = BLOCK_ROWS_B % BLOCK_N == 0
        if UNIFORM_B:
            from_b = scale_b_ptr + batch * stride_bb + tile_n * BLOCK_N // BLOCK_ROWS_B * stride_bn
        else:
            from_b = scale_b_ptr + batch * stride_bb + columns // BLOCK_ROWS_B * stride_bn
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            left, right = a.load([row_a, step * BLOCK_K]), b.load([row_b, step * BLOCK_K])
            scale_a = tl.load(from_a + step // STEPS_A * stride_ak, mask=rows < M, other=0.0)
            part = tl.dot(left, right.T)
            if UNIFORM_B:
                acc += part * (scale_a * tl.load(from_b + step // STEPS_B * stride_bk))[:, None]
            else:
                scale_b = tl.load(from_b + step // STEPS_B * stride_bk, mask=columns < N, other=0.0)
                acc += part * scale_a[:, None] * scale_b[None, :]
        place = (batch, tile_m * BLOCK_M, M, N)
        strides = (stride_cb, stride_cm, stride_cn)
        ends = (bias_ptr, out_scale_ptr, record_ptr, rng_ptr, key)
        finish(c, acc, ends, place, tile_n * BLOCK_N, strides, END, TMA_STORE, DTYPE, PARTS)
