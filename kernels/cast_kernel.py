# mypy: allow-untyped-defs, allow-incomplete-defs
"""The device code of cast: a tile is read once, in four quarters (see `quarters`), encoded in registers and stored twice.

AXIS and AXIS_T say along what the scales of q and of qT run: 0 one, 1 per row, 2 per column of x, 3 unscaled; -1 there is no q, or no
qT; AXIS_T -2: the codes of q. See `cast` for the formula.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.codes import encode
from fp8fx.kernels.column_sums import store_partial
from fp8fx.kernels.quarters import load_quarter, locate, store_quarter, store_transposed, zero_codes
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.records import amax_bits, amax_of, count_zeros, merge_amax
from fp8fx.kernels.scale import current_scale, inverse, largest_part


@triton.jit
def _finish(amax, made_ptr, index, mask, MAKE: tl.constexpr):
    """inv_scale from a scale, or from the amax that it is made of: MAKE = (FROM_AMAX, PARTS, POWER_OF_TWO, EPS, FMAX, AND_AMAX)."""
    if MAKE[0]:
        scale = current_scale(amax, MAKE[3], MAKE[4], MAKE[2])
        tl.store(made_ptr + index, scale, mask=mask)
        if MAKE[5]:
            tl.store(made_ptr + MAKE[5], amax, mask=mask)
        return inverse(scale, MAKE[2])
    else:
        return inverse(amax)


@triton.jit
def _common_inverse(source, whole, place, columns, AXIS: tl.constexpr, MAKE: tl.constexpr):
    """inv_scale as far as all rows of the tile share it: a scalar, [1, BLOCK_K] for scales per column, else 1.

    source = (scale or amax, made scale); the programs that come first along the axis store the scale that is made.
    """
    ptr, made_ptr = source
    b, tile_m, tile_k, _, K = place
    if AXIS == 0:
        return _finish(whole, made_ptr, 0, (b + tile_m + tile_k) == 0, MAKE)
    elif AXIS == 2:
        found = tl.load(ptr + b * K + columns, mask=columns < K, other=1.0)
        return _finish(found, made_ptr, b * K + columns, (columns < K) & (tile_m == 0), MAKE)[None, :]
    else:
        return 1.0


@triton.jit
def _encode_quarter(x, common, source, random, place, rows, AXIS: tl.constexpr, MAKE: tl.constexpr, HOW: tl.constexpr):
    """uint8 codes of one quarter under the scales of one side; HOW = (E5M2, STOCHASTIC, NONFINITE, GROUPED)."""
    b, _, tile_k, M, K = place
    y = x
    if AXIS == 1:
        ptr, made_ptr = source
        found = tl.load(ptr + b * M + rows, mask=rows < M, other=1.0)
        y = x * _finish(found, made_ptr, b * M + rows, (rows < M) & (tile_k == 0), MAKE)[:, None]
    elif AXIS != 3:
        y = x * common
    bits = x.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * x.shape[1], K, x.shape[0], x.shape[1], HOW[3])
    return encode(y, x, bits, HOW[0], HOW[1], HOW[2])


@triton.jit
def _whole(ptr, AXIS: tl.constexpr, MAKE: tl.constexpr):
    """The scale, or the amax, of a whole tensor; 1 where scales run along an axis."""
    if AXIS != 0:
        return 1.0
    elif MAKE[1] > 1:
        return largest_part(ptr, MAKE[1])
    else:
        return tl.load(ptr)


@triton.jit(do_not_specialize=["key"])
def cast_kernel(
    x_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    made_ptr,
    scale_t_ptr,
    made_t_ptr,
    record_ptr,
    sums_ptr,
    rng_ptr,
    key,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_xk,
    AXIS: tl.constexpr,
    AXIS_T: tl.constexpr,
    MAKE: tl.constexpr,  # see `_finish`
    HOW: tl.constexpr,  # see `_encode_quarter`
    RECORD: tl.constexpr,  # 0 none, 1 amax, 2 amax and counts
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    # An amax that is given need not be found again: the first program records it.
    KNOWN: tl.constexpr = MAKE[0] and (AXIS == 0 or AXIS_T == 0)
    seen = amax_bits(record_ptr) if RECORD and not KNOWN else 0
    strides = (stride_xb, stride_xm, stride_xk)
    x0 = load_quarter(x_ptr, place, rows, columns, strides)
    x1 = load_quarter(x_ptr, place, rows + 1, columns, strides)
    x2 = load_quarter(x_ptr, place, rows + 2, columns, strides)
    x3 = load_quarter(x_ptr, place, rows + 3, columns, strides)

    random = (rng_ptr, key)
    c0, c1, c2, c3 = zero_codes(x0)
    if AXIS >= 0:
        source = (scale_ptr, made_ptr)
        whole = _whole(scale_ptr, AXIS, MAKE)
        inv = _common_inverse(source, whole, place, columns, AXIS, MAKE)
        c0 = _encode_quarter(x0, inv, source, random, place, rows, AXIS, MAKE, HOW)
        store_quarter(q_ptr, c0, place, rows, columns)
        c1 = _encode_quarter(x1, inv, source, random, place, rows + 1, AXIS, MAKE, HOW)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        c2 = _encode_quarter(x2, inv, source, random, place, rows + 2, AXIS, MAKE, HOW)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        c3 = _encode_quarter(x3, inv, source, random, place, rows + 3, AXIS, MAKE, HOW)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
        if KNOWN and RECORD:
            _record_known(record_ptr, whole)
        if RECORD == 2:
            count_zeros(record_ptr, x0, x1, x2, x3, c0, c1, c2, c3, place, BLOCK_M)
    if AXIS_T >= 0:
        turned = (scale_t_ptr, made_t_ptr)
        whole_t = _whole(scale_t_ptr, AXIS_T, MAKE)
        inv_t = _common_inverse(turned, whole_t, place, columns, AXIS_T, MAKE)
        c0 = _encode_quarter(x0, inv_t, turned, random, place, rows, AXIS_T, MAKE, HOW)
        c1 = _encode_quarter(x1, inv_t, turned, random, place, rows + 1, AXIS_T, MAKE, HOW)
        c2 = _encode_quarter(x2, inv_t, turned, random, place, rows + 2, AXIS_T, MAKE, HOW)
        c3 = _encode_quarter(x3, inv_t, turned, random, place, rows + 3, AXIS_T, MAKE, HOW)
        if KNOWN and RECORD and AXIS != 0:
            _record_known(record_ptr, whole_t)
        if RECORD == 2 and AXIS < 0:
            count_zeros(record_ptr, x0, x1, x2, x3, c0, c1, c2, c3, place, BLOCK_M)
    # What reads x comes first: from then on only its codes take registers.
    if SUMS:
        store_partial(sums_ptr, (x0 + x1) + (x2 + x3), place, columns, BLOCK_M, 1)
    if RECORD and not KNOWN:
        merge_amax(record_ptr, seen, amax_of(x0, x1, x2, x3))
    if AXIS_T != -1:
        store_transposed(t_ptr, c0, c1, c2, c3, place, words, columns)


@triton.jit
def _record_known(record_ptr, amax):
    if tl.program_id(0) == 0:
        merge_amax(record_ptr, amax_bits(record_ptr), amax)
