# mypy: allow-untyped-defs, allow-incomplete-defs
"""The device code of norm_backward_cast: the two sums of each row, then tiles in four quarters. See `norm_backward` for the formula."""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.codes import finite_magnitude, largest_of
from fp8fx.kernels.column_sums import store_partial
from fp8fx.kernels.norm_statistics import load_vector
from fp8fx.kernels.quarters import load_quarter, locate
from fp8fx.kernels.results import tensor_inverse, write_result


@triton.jit
def _terms(x, dy, weight, mean, rstd, dtype: tl.constexpr, NORM: tl.constexpr):
    """(n, g); NORM = (RMS, ROUND_FIRST, WEIGHT)."""
    n = x * rstd if NORM[0] else (x - mean) * rstd
    g = dy * weight
    if NORM[1]:
        n, g = n.to(dtype).to(tl.float32), g.to(dtype).to(tl.float32)
    return n, g


@triton.jit
def _gradient(n, g, add, rstd, mean_g, mean_gn, dtype: tl.constexpr, RMS: tl.constexpr, ADD: tl.constexpr):
    """dx in float32, with the values that `dtype` holds."""
    inner = g - n * mean_gn if RMS else g - mean_g - n * mean_gn
    dx = (inner * rstd).to(dtype).to(tl.float32)
    if ADD:
        dx = (dx + add).to(dtype).to(tl.float32)
    return dx


@triton.jit
def _row(ptr, at, K):
    return tl.load(ptr + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def row_sums_kernel(
    dy_ptr,
    x_ptr,
    add_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    row_sums_ptr,
    parts_ptr,
    rows,
    M,
    K,
    stride_db,
    stride_dm,
    stride_xb,
    stride_xm,
    stride_ab,
    stride_am,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    AMAX: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    BLOCK: tl.constexpr,
):
    """row_sums [2, rows]: sum(g * n) / K and, for layer, sum(g) / K."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = (rows - 1 - i).to(tl.int64)
        dy_row = dy_ptr + row // M * stride_db + row % M * stride_dm
        x_row = x_ptr + row // M * stride_xb + row % M * stride_xm
        add_row = add_ptr + row // M * stride_ab + row % M * stride_am
        rstd = tl.load(rstd_ptr + row)
        mean = 0.0 if NORM[0] else tl.load(mean_ptr + row)
        if WHOLE:
            weight = load_vector(weight_ptr, columns, K, NORM[2], 1.0)  # 0 beyond K, and so is g
            n, g = _terms(_row(x_row, columns, K), _row(dy_row, columns, K), weight, mean, rstd, dtype, NORM)
            gn, gs = g * n, g
        else:
            gn, gs = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, K, BLOCK):
                at = start + columns
                weight = load_vector(weight_ptr, at, K, NORM[2], 1.0)
                n, g = _terms(_row(x_row, at, K), _row(dy_row, at, K), weight, mean, rstd, dtype, NORM)
                gn += g * n
                gs += g
        mean_gn, mean_g = tl.sum(gn, 0) / K, tl.sum(gs, 0) / K
        tl.store(row_sums_ptr + row, mean_gn)
        if not NORM[0]:
            tl.store(row_sums_ptr + rows + row, mean_g)
        if AMAX and WHOLE:
            add = _row(add_row, columns, K) if ADD else 0.0
            dx = _gradient(n, g, add, rstd, mean_g, mean_gn, dtype, NORM[0], ADD)
            largest = tl.maximum(largest, tl.where(columns < K, finite_magnitude(dx), 0.0))
        elif AMAX:
            for start in range(0, K, BLOCK):
                at = start + columns
                weight = load_vector(weight_ptr, at, K, NORM[2], 1.0)
                n, g = _terms(_row(x_row, at, K), _row(dy_row, at, K), weight, mean, rstd, dtype, NORM)
                add = _row(add_row, at, K) if ADD else 0.0
                dx = _gradient(n, g, add, rstd, mean_g, mean_gn, dtype, NORM[0], ADD)
                largest = tl.maximum(largest, tl.where(at < K, finite_magnitude(dx), 0.0))
    if AMAX:
        tl.store(parts_ptr + tl.program_id(0), largest_of(largest))


@triton.jit
def _quarter(inputs, weight, place, rows, columns, strides, NORM: tl.constexpr, ADD: tl.constexpr):
    """(dx, dy * n, dy) of one quarter; 0 outside of the matrix."""
    dy_ptr, x_ptr, add_ptr, mean_ptr, rstd_ptr, row_sums_ptr, all_rows = inputs
    strides_dy, strides_x, strides_add = strides
    b, _, _, M, K = place
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, below = b * M + rows, rows < M
    rstd = tl.load(rstd_ptr + row, mask=below, other=0.0)[:, None]
    mean_gn = tl.load(row_sums_ptr + row, mask=below, other=0.0)[:, None]
    mean, mean_g, add = 0.0, 0.0, 0.0
    if not NORM[0]:
        mean = tl.load(mean_ptr + row, mask=below, other=0.0)[:, None]
        mean_g = tl.load(row_sums_ptr + all_rows + row, mask=below, other=0.0)[:, None]
    x, dy = load_quarter(x_ptr, place, rows, columns, strides_x), load_quarter(dy_ptr, place, rows, columns, strides_dy)
    if ADD:
        add = load_quarter(add_ptr, place, rows, columns, strides_add)
    n, g = _terms(x, dy, weight[None, :], mean, rstd, dtype, NORM)
    dx = _gradient(n, g, add, rstd, mean_g, mean_gn, dtype, NORM[0], ADD)
    return tl.where(below[:, None] & (columns < K)[None, :], dx, 0.0), dy * n, dy


@triton.jit
def _store_rows(out_ptr, values, place, rows, columns):
    b, _, _, M, K = place
    at = (b * M + rows.to(tl.int64))[:, None] * K + columns[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit(do_not_specialize=["key"])
def norm_backward_kernel(
    dy_ptr,
    x_ptr,
    add_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    row_sums_ptr,
    dx_ptr,
    gradients_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    made_ptr,
    record_ptr,
    sums_ptr,
    rng_ptr,
    key,
    all_rows,
    M,
    K,
    stride_db,
    stride_dm,
    stride_xb,
    stride_xm,
    stride_ab,
    stride_am,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    WRITE: tl.constexpr,  # dx
    GRADIENTS: tl.constexpr,  # 0 none, 1 of the weight, 2 of the bias, 3 of both: partial sums [tile rows, 1 or 2, K]
    HOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    into = (q_ptr, t_ptr, scale_ptr, made_ptr, record_ptr, sums_ptr)
    inv = tensor_inverse(into, HOW)
    weight = load_vector(weight_ptr, columns, K, NORM[2], 1.0)
    inputs = (dy_ptr, x_ptr, add_ptr, mean_ptr, rstd_ptr, row_sums_ptr, all_rows)
    strides = ((stride_db, stride_dm, 1), (stride_xb, stride_xm, 1), (stride_ab, stride_am, 1))
    dx0, w0, b0 = _quarter(inputs, weight, place, rows, columns, strides, NORM, ADD)
    dx1, w1, b1 = _quarter(inputs, weight, place, rows + 1, columns, strides, NORM, ADD)
    dx2, w2, b2 = _quarter(inputs, weight, place, rows + 2, columns, strides, NORM, ADD)
    dx3, w3, b3 = _quarter(inputs, weight, place, rows + 3, columns, strides, NORM, ADD)
    if GRADIENTS & 1:
        store_partial(gradients_ptr, (w0 + w1) + (w2 + w3), place, columns, BLOCK_M, 2 if GRADIENTS == 3 else 1)
    if GRADIENTS == 2:
        store_partial(gradients_ptr, (b0 + b1) + (b2 + b3), place, columns, BLOCK_M, 1)
    elif GRADIENTS == 3:
        store_partial(gradients_ptr + K, (b0 + b1) + (b2 + b3), place, columns, BLOCK_M, 2)
    if WRITE:
        _store_rows(dx_ptr, dx0, place, rows, columns)
        _store_rows(dx_ptr, dx1, place, rows + 1, columns)
        _store_rows(dx_ptr, dx2, place, rows + 2, columns)
        _store_rows(dx_ptr, dx3, place, rows + 3, columns)
    write_result(dx0, dx1, dx2, dx3, into, (rng_ptr, key), place, (rows, words, columns), inv, BLOCK_M, HOW)
