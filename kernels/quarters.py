# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiles in four quarters: quarter i holds rows i, i + 4, i + 8, ... of the tile.

A transposed tile of bytes, exchanged between threads byte by byte, is bound by shared memory. Loaded as quarters, the four bytes that
are neighbours in a transposed row sit in the same place of four tensors, hence in one thread, which packs them into a word; then
words are exchanged, a quarter as many. That needs a multiple of 4 rows; otherwise each quarter is stored by bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def locate(M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's tile of [B, M, K]: its place (b int64, tile_m, tile_k, M, K), rows of quarter 0, words along qT's rows, columns."""
    tiles_k, tiles_m = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    tile_m, tile_k = (pid // tiles_k) % tiles_m, pid % tiles_k
    words = tile_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
    place = ((pid // (tiles_k * tiles_m)).to(tl.int64), tile_m, tile_k, M, K)
    return place, 4 * words, words, tile_k * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def load_quarter(x_ptr, place, rows, columns, strides):
    """float32 [rows, columns] of the program's matrix, zeros outside."""
    b, _, _, M, K = place
    stride_xb, stride_xm, stride_xk = strides
    at = b * stride_xb + rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    return tl.load(x_ptr + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def zero_codes(x):
    """Four quarters of zeros like x, for names that a compile-time branch sets."""
    zeros = tl.zeros(x.shape, tl.uint8)
    return zeros, zeros, zeros, zeros


@triton.jit
def store_quarter(q_ptr, codes, place, rows, columns):
    """uint8 codes to their places in contiguous q [B, M, K]."""
    b, _, _, M, K = place
    at = (b * M + rows.to(tl.int64))[:, None] * K + columns[None, :]
    tl.store(q_ptr + at, codes, mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def store_transposed(t_ptr, c0, c1, c2, c3, place, rows, words, columns, M_WORDS, PACKED: tl.constexpr):
    """The quarters of codes to their places in contiguous qT [B, K, M]; t_ptr is int32 if PACKED, else uint8. M_WORDS: M // 4."""
    b, _, _, M, K = place
    line = (b * K + columns.to(tl.int64))[:, None]
    inside = (columns < K)[:, None]
    if PACKED:
        packed = c0.to(tl.uint32) | (c1.to(tl.uint32) << 8) | (c2.to(tl.uint32) << 16) | (c3.to(tl.uint32) << 24)
        at = line * M_WORDS + words[None, :]
        tl.store(t_ptr + at, tl.trans(packed).to(tl.int32, bitcast=True), mask=inside & (words < M_WORDS)[None, :])
    else:
        at = line * M + rows[None, :]
        tl.store(t_ptr + at, tl.trans(c0), mask=inside & (rows < M)[None, :])
        tl.store(t_ptr + at + 1, tl.trans(c1), mask=inside & (rows + 1 < M)[None, :])
        tl.store(t_ptr + at + 2, tl.trans(c2), mask=inside & (rows + 2 < M)[None, :])
        tl.store(t_ptr + at + 3, tl.trans(c3), mask=inside & (rows + 3 < M)[None, :])


def byte_views(x: Tensor, q: Tensor | None, t: Tensor | None) -> tuple[list[Tensor], bool]:
    """q and qT as the kernels take them, x standing in for None, and whether qT is written by words."""
    packed = t is not None and t.shape[-1] % 4 == 0
    rows = x if q is None else q.view(torch.uint8)
    return [rows, x if t is None else t.view(torch.int32 if packed else torch.uint8)], packed
