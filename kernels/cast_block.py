# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast_block: current scaling with one scale per block (1x128, 128x128, ...), amax, scale and codes in one read of x per set of blocks.

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
from fp8fx.kernels.codes import encode, finite_magnitude, hardware_format
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import cdiv, check_input, empty_transposed, matrices
from fp8fx.kernels.quarters import load_quarter, locate, store_quarter, store_transposed
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.scale import current_scale, inverse

# block side, which is the side of the tile -> num_warps
_WARPS = {32: 4, 64: 4, 128: 8}

# How a block (rows, columns) lies in a tile of SIDE x SIDE.
_ROW, _COLUMN, _SQUARE = 1, 2, 3


@triton.jit
def _common_inverse(x0, x1, x2, x3, into, place, columns, KIND: tl.constexpr, E5M2: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """inv_scale of blocks that lie across all quarters, [1, SIDE] for columns, a scalar for a square, else 1.

    Stores amax and scale; into = (amax pointer, scale pointer, eps, tiles along M, tiles along K).
    """
    if KIND == 1:
        return 1.0
    else:
        amax_ptr, scale_ptr, eps, tiles_m, tiles_k = into
        b, tile_m, tile_k, _, K = place
        a0, a1, a2, a3 = finite_magnitude(x0), finite_magnitude(x1), finite_magnitude(x2), finite_magnitude(x3)
        largest = tl.max(tl.maximum(tl.maximum(a0, a1), tl.maximum(a2, a3)), 0)
        if KIND == 2:
            at = (b * tiles_m + tile_m) * K + columns
            scale = current_scale(largest, eps, 57344.0 if E5M2 else 448.0, POWER_OF_TWO)
            tl.store(amax_ptr + at, largest, mask=columns < K)
            tl.store(scale_ptr + at, scale, mask=columns < K)
            return inverse(scale)[None, :]
        else:
            whole = tl.max(largest, 0)
            scale = current_scale(whole, eps, 57344.0 if E5M2 else 448.0, POWER_OF_TWO)
            at = (b * tiles_m + tile_m) * tiles_k + tile_k
            tl.store(amax_ptr + at, whole)
            tl.store(scale_ptr + at, scale)
            return inverse(scale)


@triton.jit
def _encode_quarter(
    x,
    common,
    into,
    random,
    place,
    rows,
    KIND: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NONFINITE: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """uint8 codes of one quarter; blocks of rows lie within it, and their amax and scale are stored here."""
    b, _, tile_k, M, K = place
    if KIND == 1:
        amax_ptr, scale_ptr, eps, _, tiles_k = into
        largest = tl.max(finite_magnitude(x), 1)
        scale = current_scale(largest, eps, 57344.0 if E5M2 else 448.0, POWER_OF_TWO)
        at = (b * M + rows) * tiles_k + tile_k
        tl.store(amax_ptr + at, largest, mask=rows < M)
        tl.store(scale_ptr + at, scale, mask=rows < M)
        y = x * inverse(scale)[:, None]
    else:
        y = x * common
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * x.shape[1], K, x.shape[0], x.shape[1], GROUPED)
    return encode(y, x, bits, E5M2, STOCHASTIC, NONFINITE)


@triton.jit(do_not_specialize=["key"])
def _cast_block_kernel(
    x_ptr,
    q_ptr,
    t_ptr,
    amax_ptr,
    scale_ptr,
    rng_ptr,
    key,
    eps,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_xk,
    KIND: tl.constexpr,  # of the blocks: 1 rows (1 x SIDE), 2 columns (SIDE x 1), 3 square
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NONFINITE: tl.constexpr,
    GROUPED: tl.constexpr,
    SIDE: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, SIDE, SIDE)
    strides = (stride_xb, stride_xm, stride_xk)
    x0 = load_quarter(x_ptr, place, rows, columns, strides)
    x1 = load_quarter(x_ptr, place, rows + 1, columns, strides)
    x2 = load_quarter(x_ptr, place, rows + 2, columns, strides)
    x3 = load_quarter(x_ptr, place, rows + 3, columns, strides)
    random = (rng_ptr, key)
    into = (amax_ptr, scale_ptr, eps, tl.cdiv(M, SIDE), tl.cdiv(K, SIDE))
    inv = _common_inverse(x0, x1, x2, x3, into, place, columns, KIND, E5M2, POWER_OF_TWO)
    c0 = _encode_quarter(x0, inv, into, random, place, rows, KIND, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
    c1 = _encode_quarter(x1, inv, into, random, place, rows + 1, KIND, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
    c2 = _encode_quarter(x2, inv, into, random, place, rows + 2, KIND, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
    c3 = _encode_quarter(x3, inv, into, random, place, rows + 3, KIND, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
    if ROWS:
        store_quarter(q_ptr, c0, place, rows, columns)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if TRANSPOSED:
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
    if layout == "both" and block != block_t:
        # Two sets of scales and codes at once leave room for one program per multiprocessor: reading x twice is faster.
        left = cast_block(x, format, block, block_t, "rows", how, power_of_two, eps)
        right = cast_block(x, format, block, block_t, "transposed", how, power_of_two, eps)
        return Quantized(left.q, right.q_t, left.scale, right.scale_t, left.amax, right.amax_t)
    fp8 = hardware_format(format)
    rows, transposed = layout != "transposed", layout != "rows"
    q = torch.empty(x.shape, dtype=fp8.torch_dtype, device=x.device) if rows else None
    t = empty_transposed(x.shape, fp8.torch_dtype, x) if transposed else None
    amax, scale = _blocks(x, block if rows else block_t)
    if x.numel() > 0:
        seen = matrices(x)
        pointers = (seen.x, x if q is None else q, x if t is None else t, amax, scale, x if how.rng is None else how.rng)
        launch(
            _cast_block_kernel,
            (seen.tiles(side, side),),
            (*pointers, how.signed_key, eps, seen.m, seen.k, *seen.strides),
            {
                "KIND": kinds[block if rows else block_t],
                "ROWS": rows,
                "TRANSPOSED": transposed,
                "POWER_OF_TWO": power_of_two,
                "E5M2": fp8.name == "e5m2",
                "STOCHASTIC": how.stochastic,
                "NONFINITE": how.nonfinite,
                "GROUPED": seen.k % 4 == 0,
                "SIDE": side,
            },
            num_warps=_WARPS[side],
        )
    own, turned = (amax, scale) if rows else (None, None), (amax, scale) if transposed else (None, None)
    return Quantized(q, t, own[1], turned[1], own[0], turned[0])


def _blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Empty amax and scale."""
    shape = (*x.shape[:-2], cdiv(x.shape[-2], block[0]), cdiv(x.shape[-1], block[1]))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
