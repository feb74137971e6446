# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast_block: current scaling with one scale per block (1x128, 128x128, ...), amax, scale and codes, q and qT, in one read of x.

    amax[i, j]  = max |x| over the finite elements of block (i, j)
    scale[i, j] = current_scale(amax[i, j])
    q           = encode(float32(x) * inv_scale of its block)       [..., M, K] row-major
    qT          = the same under blocks of its own, transposed      [..., K, M] row-major, rows padded (`layout.pitch`)

The GEMM that reads qT contracts over M, so 1x128 blocks of x for q go with 128x1 blocks of x for qT; 128x128 blocks serve both, and
q and qT then share codes. A program's tile holds whole blocks. Reference: `fp8fx.numerics.quantize_tensor`, equal byte for byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.cast import NEAREST, Quantized, Rounding
from fp8fx.kernels.codes import encode, hardware_format, magnitude_of, ordered
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import cdiv, check_input, empty_transposed, matrices
from fp8fx.kernels.quarters import load_quarter, locate, store_quarter, store_transposed, zero_codes
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.scale import current_scale, inverse

# block side, which is the side of the tile -> num_warps
_WARPS = {32: 4, 64: 4, 128: 8}

# How a block (rows, columns) lies in a tile of SIDE x SIDE.
_NONE, _ROW, _COLUMN, _SQUARE = 0, 1, 2, 3


@triton.jit
def _store_scale(into, at, mask, order, HOW: tl.constexpr):
    """inv_scale of blocks whose largest `ordered` element is given; amax and scale go to place `at`. into: see `_common_inverse`."""
    amax_ptr, scale_ptr, eps = into
    amax = magnitude_of(order)
    scale = current_scale(amax, eps, 57344.0 if HOW[0] else 448.0, HOW[4])
    tl.store(amax_ptr + at, amax, mask=mask)
    tl.store(scale_ptr + at, scale, mask=mask)
    return inverse(scale, HOW[4])


@triton.jit
def _common_inverse(x0, x1, x2, x3, into, place, columns, SIDE: tl.constexpr, KIND: tl.constexpr, HOW: tl.constexpr):
    """inv_scale of blocks that lie across all quarters, [1, SIDE] for columns, a scalar for a square, else 1.

    Stores amax and scale; into = (amax pointer, scale pointer, eps).
    """
    b, tile_m, tile_k, M, K = place
    if KIND < 2:
        return 1.0
    else:
        order = tl.max(tl.maximum(tl.maximum(ordered(x0), ordered(x1)), tl.maximum(ordered(x2), ordered(x3))), 0)
        line = b * tl.cdiv(M, SIDE) + tile_m
        if KIND == 2:
            return _store_scale(into, line * K + columns, columns < K, order, HOW)[None, :]
        else:
            return _store_scale(into, line * tl.cdiv(K, SIDE) + tile_k, True, tl.max(order, 0), HOW)


@triton.jit
def _encode_quarter(x, common, into, random, place, rows, SIDE: tl.constexpr, KIND: tl.constexpr, HOW: tl.constexpr):
    """uint8 codes of one quarter; blocks of rows lie within it, and their amax and scale are stored here.

    HOW = (E5M2, STOCHASTIC, NONFINITE, GROUPED, POWER_OF_TWO).
    """
    b, _, tile_k, M, K = place
    if KIND == 1:
        at = (b * M + rows) * tl.cdiv(K, SIDE) + tile_k
        y = x * _store_scale(into, at, rows < M, tl.max(ordered(x), 1), HOW)[:, None]
    else:
        y = x * common
    bits = x.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * SIDE, K, x.shape[0], SIDE, HOW[3])
    return encode(y, x, bits, HOW[0], HOW[1], HOW[2])


@triton.jit(do_not_specialize=["key"])
def _cast_block_kernel(
    x_ptr,
    q_ptr,
    t_ptr,
    amax_ptr,
    scale_ptr,
    amax_t_ptr,
    scale_t_ptr,
    rng_ptr,
    key,
    eps,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_xk,
    KIND: tl.constexpr,  # of the blocks of q: 0 there is no q, 1 rows (1 x SIDE), 2 columns (SIDE x 1), 3 square
    KIND_T: tl.constexpr,  # of the blocks of qT; -1 they and the codes are those of q
    HOW: tl.constexpr,  # see `_encode_quarter`
    SIDE: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, SIDE, SIDE)
    strides = (stride_xb, stride_xm, stride_xk)
    x0 = load_quarter(x_ptr, place, rows, columns, strides)
    x1 = load_quarter(x_ptr, place, rows + 1, columns, strides)
    x2 = load_quarter(x_ptr, place, rows + 2, columns, strides)
    x3 = load_quarter(x_ptr, place, rows + 3, columns, strides)
    random = (rng_ptr, key)
    c0, c1, c2, c3 = zero_codes(x0)
    if KIND:
        into = (amax_ptr, scale_ptr, eps)
        inv = _common_inverse(x0, x1, x2, x3, into, place, columns, SIDE, KIND, HOW)
        c0 = _encode_quarter(x0, inv, into, random, place, rows, SIDE, KIND, HOW)
        store_quarter(q_ptr, c0, place, rows, columns)
        c1 = _encode_quarter(x1, inv, into, random, place, rows + 1, SIDE, KIND, HOW)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        c2 = _encode_quarter(x2, inv, into, random, place, rows + 2, SIDE, KIND, HOW)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        c3 = _encode_quarter(x3, inv, into, random, place, rows + 3, SIDE, KIND, HOW)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if KIND_T > 0:
        into_t = (amax_t_ptr, scale_t_ptr, eps)
        inv_t = _common_inverse(x0, x1, x2, x3, into_t, place, columns, SIDE, KIND_T, HOW)
        c0 = _encode_quarter(x0, inv_t, into_t, random, place, rows, SIDE, KIND_T, HOW)
        c1 = _encode_quarter(x1, inv_t, into_t, random, place, rows + 1, SIDE, KIND_T, HOW)
        c2 = _encode_quarter(x2, inv_t, into_t, random, place, rows + 2, SIDE, KIND_T, HOW)
        c3 = _encode_quarter(x3, inv_t, into_t, random, place, rows + 3, SIDE, KIND_T, HOW)
    if KIND_T:
        store_transposed(t_ptr, c0, c1, c2, c3, place, words, columns)


def cast_block(
    x: Tensor,
    format: str | Format,
    block: tuple[int, int] = (1, 128),
    block_t: tuple[int, int] | None = None,
    layout: str = "rows",
    how: Rounding = NEAREST,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> Quantized:
    """Codes of bf16, fp16 or fp32 `x` [..., M, K] with a scale per `block` (rows, columns) of x for q, per `block_t` of x for qT.

    Blocks are (1, S), (S, 1) or (S, S) with one S of 32, 64 or 128 in both. block_t None: `block` turned, what the GEMM contracting
    over M wants. amax and scale are float32 [..., ceil(M / rows), ceil(K / columns)], those of qT too (in x's axes). layout: rows,
    transposed or both.
    """
    check_input(x, "cast_block")
    block_t = (block[1], block[0]) if block_t is None else block_t
    side = max(block)
    kinds = {(1, side): _ROW, (side, 1): _COLUMN, (side, side): _SQUARE}
    if x.dim() < 2 or side not in _WARPS or block not in kinds or block_t not in kinds:
        raise KernelError(f"cast_block: blocks {block}, {block_t}: expected 1 x S, S x 1 or S x S, S one of 32, 64, 128, and 2 dimensions")
    fp8 = hardware_format(format)
    rows, transposed = layout != "transposed", layout != "rows"
    shared = rows and transposed and block == block_t
    q = torch.empty(x.shape, dtype=fp8.torch_dtype, device=x.device) if rows else None
    t = empty_transposed(x.shape, fp8.torch_dtype, x) if transposed else None
    amax, scale = _blocks(x, block) if rows else (None, None)
    amax_t, scale_t = (amax, scale) if shared else _blocks(x, block_t) if transposed else (None, None)
    if x.numel() > 0:
        seen = matrices(x)
        outputs = (x if made is None else made for made in (q, t, amax, scale, amax_t, scale_t))  # x: nothing is written there
        launch(
            _cast_block_kernel,
            (seen.tiles(side, side),),
            (seen.x, *outputs, x if how.rng is None else how.rng, how.signed_key, eps, seen.m, seen.k, *seen.strides),
            {
                "KIND": kinds[block] if rows else _NONE,
                "KIND_T": -1 if shared else kinds[block_t] if transposed else _NONE,
                "HOW": (fp8.name == "e5m2", how.stochastic, how.nonfinite, seen.k % 4 == 0, power_of_two),
                "SIDE": side,
            },
            num_warps=_WARPS[side],
        )
    return Quantized(q, t, scale, scale_t, amax, amax_t)


def _blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Empty amax and scale."""
    shape = (*x.shape[:-2], cdiv(x.shape[-2], block[0]), cdiv(x.shape[-1], block[1]))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
