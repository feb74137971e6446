# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast_block: current scaling with one scale per block (1x128, 128x128, ...), amax, scale and codes in one read of x.

q and qT are made in one read too where scales are powers of two and codes are rounded to nearest; else in one read each.

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
from fp8fx.kernels.quarters import load_narrow, locate, store_quarter, store_transposed, widened, zero_codes
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.scale import finite_scale, inverse

# block side, which is the side of the tile -> num_warps
_WARPS = {32: 4, 64: 4, 128: 8}
_TWO_PROGRAMS = 128  # registers of a thread, with 8 warps: Triton 3.7 takes 142 for two sets of scales

# How a block (rows, columns) lies in a tile of SIDE x SIDE.
_NONE, _ROW, _COLUMN, _SQUARE = 0, 1, 2, 3


@triton.jit
def _inverse(into, at, mask, order, HOW: tl.constexpr):
    """inv_scale of blocks whose largest `ordered` element is given; amax and scale go to place `at`. into: see `_inverses`."""
    amax_ptr, scale_ptr, eps = into
    amax = magnitude_of(order)
    scale = finite_scale(amax, eps, 57344.0 if HOW[0] else 448.0, HOW[4])
    tl.store(amax_ptr + at, amax, mask=mask)
    tl.store(scale_ptr + at, scale, mask=mask)
    return inverse(scale, HOW[4])


@triton.jit
def _inverses(orders, into, place, rows, columns, SIDE: tl.constexpr, KIND: tl.constexpr, HOW: tl.constexpr):
    """inv_scale for each quarter: [rows, 1] for blocks of rows, which lie within it, else one for all, [1, SIDE] or a scalar.

    orders: `ordered` of each quarter. Stores amax and scale; into = (amax pointer, scale pointer, eps).
    """
    o0, o1, o2, o3 = orders
    b, tile_m, tile_k, M, K = place
    if KIND == 1:
        width = tl.cdiv(K, SIDE)
        at = (b * M + rows) * width + tile_k
        i0 = _inverse(into, at, rows < M, tl.max(o0, 1), HOW)[:, None]
        i1 = _inverse(into, at + width, rows + 1 < M, tl.max(o1, 1), HOW)[:, None]
        i2 = _inverse(into, at + 2 * width, rows + 2 < M, tl.max(o2, 1), HOW)[:, None]
        i3 = _inverse(into, at + 3 * width, rows + 3 < M, tl.max(o3, 1), HOW)[:, None]
        return i0, i1, i2, i3
    else:
        order = tl.max(tl.maximum(tl.maximum(o0, o1), tl.maximum(o2, o3)), 0)
        line = b * tl.cdiv(M, SIDE) + tile_m
        if KIND == 2:
            common = _inverse(into, line * K + columns, columns < K, order, HOW)[None, :]
        else:
            common = _inverse(into, line * tl.cdiv(K, SIDE) + tile_k, True, tl.max(order, 0), HOW)
        return common, common, common, common


@triton.jit
def _encode_quarter(x, inv, random, place, rows, SIDE: tl.constexpr, NARROW: tl.constexpr, HOW: tl.constexpr):
    """uint8 codes of one quarter, x in its own dtype. HOW = (E5M2, STOCHASTIC, NONFINITE, GROUPED, POWER_OF_TWO)."""
    b, _, tile_k, M, K = place
    x = widened(x) if NARROW else x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * SIDE, K, x.shape[0], SIDE, HOW[3])
    return encode(x * inv, x, bits, HOW[0], HOW[1], HOW[2])


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
    x0 = load_narrow(x_ptr, place, rows, columns, strides)
    x1 = load_narrow(x_ptr, place, rows + 1, columns, strides)
    x2 = load_narrow(x_ptr, place, rows + 2, columns, strides)
    x3 = load_narrow(x_ptr, place, rows + 3, columns, strides)
    # All scales first. Read once more, x waits in its own dtype, in half the registers; read twice more, it had better stay widened, and
    # where scales are divided registers do not suffice for either.
    NARROW: tl.constexpr = HOW[4] and (KIND == 0 or KIND_T <= 0)
    orders = (ordered(x0.to(tl.float32)), ordered(x1.to(tl.float32)), ordered(x2.to(tl.float32)), ordered(x3.to(tl.float32)))
    if KIND:
        i0, i1, i2, i3 = _inverses(orders, (amax_ptr, scale_ptr, eps), place, rows, columns, SIDE, KIND, HOW)
    if KIND_T > 0:
        t0, t1, t2, t3 = _inverses(orders, (amax_t_ptr, scale_t_ptr, eps), place, rows, columns, SIDE, KIND_T, HOW)
    random = (rng_ptr, key)
    c0, c1, c2, c3 = zero_codes(x0)
    if KIND:
        c0 = _encode_quarter(x0, i0, random, place, rows, SIDE, NARROW, HOW)
        store_quarter(q_ptr, c0, place, rows, columns)
        c1 = _encode_quarter(x1, i1, random, place, rows + 1, SIDE, NARROW, HOW)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        c2 = _encode_quarter(x2, i2, random, place, rows + 2, SIDE, NARROW, HOW)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        c3 = _encode_quarter(x3, i3, random, place, rows + 3, SIDE, NARROW, HOW)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if KIND_T > 0:
        c0 = _encode_quarter(x0, t0, random, place, rows, SIDE, NARROW, HOW)
        c1 = _encode_quarter(x1, t1, random, place, rows + 1, SIDE, NARROW, HOW)
        c2 = _encode_quarter(x2, t2, random, place, rows + 2, SIDE, NARROW, HOW)
        c3 = _encode_quarter(x3, t3, random, place, rows + 3, SIDE, NARROW, HOW)
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
    if layout == "both" and block != block_t and (not power_of_two or how.stochastic):
        # Quotients or random words beside two sets of scales leave room for one program per multiprocessor: reading x twice is faster.
        left = cast_block(x, format, block, block_t, "rows", how, power_of_two, eps)
        right = cast_block(x, format, block, block_t, "transposed", how, power_of_two, eps)
        return Quantized(left.q, right.q_t, left.scale, right.scale_t, left.amax, right.amax_t)
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
            maxnreg=_TWO_PROGRAMS if rows and transposed and not shared and side == 128 else None,
        )
    return Quantized(q, t, scale, scale_t, amax, amax_t)


def _blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Empty amax and scale."""
    shape = (*x.shape[:-2], cdiv(x.shape[-2], block[0]), cdiv(x.shape[-1], block[1]))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
