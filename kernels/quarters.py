# mypy: allow-untyped-defs, allow-incomplete-defs
"""Tiles in four quarters: quarter i holds rows i, i + 4, i + 8, ... of the tile.

A transposed tile of bytes, exchanged between threads byte by byte, is bound by shared memory. Loaded as quarters, the four bytes that
are neighbours in a transposed row sit in the same place of four tensors, hence in one thread, which packs them into a word; then
words are exchanged, a quarter as many. Transposed rows are padded to whole words for that, see `layout.pitch`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.interpret import INTERPRET


@triton.jit
def locate(M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's tile of [B, M, K]: its place (b int64, tile_m, tile_k, M, K), rows of quarter 0, words along qT's rows, columns."""
    return locate_tile(tl.program_id(0), M, K, BLOCK_M, BLOCK_K)


@triton.jit
def locate_tile(tile, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of the tile with this number."""
    tiles_k, tiles_m = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    tile_m, tile_k = (tile // tiles_k) % tiles_m, tile % tiles_k
    words = tile_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
    place = ((tile // (tiles_k * tiles_m)).to(tl.int64), tile_m, tile_k, M, K)
    return place, 4 * words, words, tile_k * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def load_quarter(x_ptr, place, rows, columns, strides):
    """float32 [rows, columns] of the program's matrix, zeros outside."""
    return load_narrow(x_ptr, place, rows, columns, strides).to(tl.float32)


@triton.jit
def load_narrow(x_ptr, place, rows, columns, strides):
    """The same in the dtype of x."""
    b, _, _, M, K = place
    stride_xb, stride_xm, stride_xk = strides
    at = b * stride_xb + rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    return tl.load(x_ptr + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def widened(x):
    """float32 of what `load_narrow` gave, made anew at each call: what is read twice then waits in half the registers.

    The compiler would make it once and keep it; it does not look into PTX.
    """
    if x.dtype == tl.bfloat16 and not INTERPRET:
        return tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [x], dtype=tl.float32, is_pure=False, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def zero_codes(x):
    """Four quarters of zeros like x, for names that a compile-time branch sets."""
    zeros = tl.zeros(x.shape, tl.uint8)
    return zeros, zeros, zeros, zeros


@triton.jit
def store_quarter(q_ptr, codes, place, rows, columns):
    """uint8 codes to their places in contiguous q [B, M, K] of float8."""
    b, _, _, M, K = place
    at = (b * M + rows.to(tl.int64))[:, None] * K + columns[None, :]
    tl.store(q_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at, codes, mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def store_transposed(t_ptr, c0, c1, c2, c3, place, words, columns):
    """The quarters of codes to their places in qT [B, K, M] of float8, laid out by `layout.empty_transposed`.

    What a tile has beyond row M goes to the padding, which nobody reads: so every store is one of whole words.
    """
    b, _, _, M, K = place
    packed = c0.to(tl.uint32) | (c1.to(tl.uint32) << 8) | (c2.to(tl.uint32) << 16) | (c3.to(tl.uint32) << 24)
    pitch = tl.cdiv(M, 16) * 4  # in words: a multiple of 4, so that four are stored at once
    line = t_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (b * K + columns.to(tl.int64))[:, None] * pitch
    inside = (columns < K)[:, None] & (words < pitch)[None, :]
    tl.store(line + words[None, :], tl.trans(packed).to(tl.int32, bitcast=True), mask=inside)
