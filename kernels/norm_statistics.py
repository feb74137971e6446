# mypy: allow-untyped-defs, allow-incomplete-defs
"""The statistics of each row for LayerNorm and RMSNorm, and with them, in the same read of x, what else wants whole rows.

    s    = x + residual                            rounded to x's dtype; s is x where there is no residual
    mean = sum(s) / K                              0 for rms
    rstd = 1 / sqrt(sum((s - mean)^2) / K + eps)   float32
    parts: partial amaxes of y, the norm's output  the first pass of current scaling (see `amax_parts`)

A program holds a row at a time, in chunks of BLOCK columns if it is longer. Programs walk from the last row to the first, so that the
kernel which casts finds the first rows in the L2 cache. Reference: `fp8fx.ops.norms.norm_cast_reference`; the order of the sums differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.kernels.amax import part_count
from fp8fx.kernels.codes import finite_magnitude, largest_of
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import Matrices, ceil_power_of_two

_MOST = 8192  # columns that a program holds at once


@triton.jit
def normalized(x, mean, rstd, weight, bias, dtype: tl.constexpr, RMS: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """y of float32 x, in float32 with the values that `dtype` holds. Everything broadcasts."""
    if not RMS:
        x = x - mean
    x = x * rstd
    if ROUND_FIRST:
        x = x.to(dtype).to(tl.float32)
    return (x * weight + bias).to(dtype).to(tl.float32)


@triton.jit
def load_vector(ptr, columns, K, GIVEN: tl.constexpr, DEFAULT: tl.constexpr):
    """float32 weight or bias of some columns; DEFAULT where there is none, 0 beyond K."""
    if GIVEN:
        return tl.load(ptr + columns, mask=columns < K, other=0.0).to(tl.float32)
    else:
        return tl.where(columns < K, DEFAULT, 0.0)


@triton.jit
def _load(x_ptr, residual_ptr, sum_ptr, columns, K, ADD: tl.constexpr):
    """float32 s of some columns, stored if it is a sum."""
    inside = columns < K
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        dtype = x_ptr.dtype.element_ty
        s = (x + tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + columns, s, mask=inside)
        x = s.to(tl.float32)
    return x


@triton.jit
def _statistics_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    parts_ptr,
    eps,
    rows,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_rb,
    stride_rm,
    NORM: tl.constexpr,  # (RMS, ROUND_FIRST, WEIGHT, BIAS)
    ADD: tl.constexpr,
    AMAX: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
    BLOCK: tl.constexpr,
):
    RMS: tl.constexpr = NORM[0]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = (rows - 1 - i).to(tl.int64)
        x_row = x_ptr + row // M * stride_xb + row % M * stride_xm
        residual_row = residual_ptr + row // M * stride_rb + row % M * stride_rm
        sum_row = sum_ptr + row * K
        mean = 0.0
        if WHOLE:
            x = _load(x_row, residual_row, sum_row, columns, K, ADD)
            if not RMS:
                mean = tl.sum(x, 0) / K
            distance = tl.where(columns < K, x - mean, 0.0)
            variance = tl.sum(distance * distance, 0) / K
        else:
            total = tl.zeros([BLOCK], tl.float32)
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, K, BLOCK):
                x = _load(x_row, residual_row, sum_row, start + columns, K, ADD)
                total += x
                squares += x * x
            if not RMS:
                mean = tl.sum(total, 0) / K
                squares = tl.zeros([BLOCK], tl.float32)
                tl.debug_barrier()  # s was written above
                for start in range(0, K, BLOCK):
                    inside = start + columns < K
                    source = sum_row if ADD else x_row
                    distance = tl.load(source + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
                    squares += tl.where(inside, distance * distance, 0.0)
            variance = tl.sum(squares, 0) / K
        rstd = 1.0 / tl.sqrt_rn(variance + eps)
        if not RMS:
            tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        if AMAX:
            if WHOLE:
                weight, bias = load_vector(weight_ptr, columns, K, NORM[2], 1.0), load_vector(bias_ptr, columns, K, NORM[3], 0.0)
                largest = tl.maximum(largest, finite_magnitude(normalized(x, mean, rstd, weight, bias, dtype, RMS, NORM[1])))
            else:
                for start in range(0, K, BLOCK):
                    at = start + columns
                    source = sum_row if ADD else x_row
                    x = tl.load(source + at, mask=at < K, other=0.0).to(tl.float32)
                    weight, bias = load_vector(weight_ptr, at, K, NORM[2], 1.0), load_vector(bias_ptr, at, K, NORM[3], 0.0)
                    largest = tl.maximum(largest, finite_magnitude(normalized(x, mean, rstd, weight, bias, dtype, RMS, NORM[1])))
    if AMAX:
        tl.store(parts_ptr + tl.program_id(0), largest_of(largest))


def block_of(k: int) -> tuple[int, int]:
    """BLOCK and num_warps for rows of k."""
    block = min(ceil_power_of_two(k), _MOST)
    return block, 8 if block > 4096 else 4


def statistics(
    x: Matrices,
    residual: Matrices | None,
    total: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    norm: tuple[bool, ...],
    amax: bool,
) -> Tensor | None:
    """Write mean (None for rms), rstd and, with a residual, `total`, contiguous; returns the partial amaxes of y if `amax`."""
    rows = x.batches * x.m
    programs = part_count(rows) if amax else rows
    parts = torch.empty(programs, dtype=torch.float32, device=rstd.device) if amax else None
    block, warps = block_of(x.k)
    added = x if residual is None else residual
    pointers = (added.x, total, weight, bias, mean, rstd, parts)
    launch(
        _statistics_kernel,
        (programs,),
        (x.x, *(x.x if part is None else part for part in pointers), eps, rows, x.m, x.k, *x.strides[:2], *added.strides[:2]),
        {"NORM": norm, "ADD": residual is not None, "AMAX": amax, "WHOLE": x.k <= block, "BLOCK": block},
        num_warps=warps,
    )
    return parts
