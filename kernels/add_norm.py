# mypy: allow-untyped-defs, allow-incomplete-defs
"""add_norm_cast: a residual added and the sum's norm written in FP8: the join of two blocks of a transformer in one pass.

    s        = x + residual                        in their dtype, written for the next join and for backward
    q, qT    of norm(s)                            as `norm_cast` writes them, with mean and rstd

Under a given scale, one program adds a slab of 16 rows, gathering their statistics chunk by chunk (Chan's rule merges mean and squared
distances), and walks over it again, out of the L2 cache, to cast it. Under current scaling the amax of the whole is wanted before the
first code: then `norm_statistics` adds, and `norm_cast`'s kernel casts. Reference: `fp8fx.ops.norms.norm_cast_reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import matrices, plain_matrices
from fp8fx.kernels.norm_cast import cast_tile, check_norm, launch_cast, scaling_of, statistics_of
from fp8fx.kernels.norm_statistics import statistics
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import Pair, Result, tensor_inverse
from fp8fx.kernels.rounding import NEAREST, Rounding

# BLOCK_M, BLOCK_K, num_warps. 16 rows of all programs at a time stay in the L2 cache for rows of up to some 8192.
_CONFIG = (16, 512, 8)


@triton.jit
def _add_chunk(x_ptr, residual_ptr, sum_ptr, place, rows, columns, strides, strides_r):
    """float32 s of one chunk, stored; 0 outside of the matrix."""
    b, _, _, M, K = place
    stride_xb, stride_xm = strides
    stride_rb, stride_rm = strides_r
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    lines = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + b * stride_xb + lines * stride_xm + columns[None, :], mask=inside, other=0.0)
    residual = tl.load(residual_ptr + b * stride_rb + lines * stride_rm + columns[None, :], mask=inside, other=0.0)
    s = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
    tl.store(sum_ptr + (b * M + lines) * K + columns[None, :], s, mask=inside)
    return s.to(tl.float32)


@triton.jit(do_not_specialize=["key"])
def _add_norm_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    made_ptr,
    record_ptr,
    sums_ptr,
    rng_ptr,
    key,
    eps,
    M,
    K,
    stride_xb,
    stride_xm,
    stride_rb,
    stride_rm,
    NORM: tl.constexpr,  # (RMS, ROUND_FIRST, WEIGHT, BIAS)
    HOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    b, tile_m = (tl.program_id(0) // tiles_m).to(tl.int64), tl.program_id(0) % tiles_m
    lines = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, distances = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    before = 0.0
    for tile_k in range(tiles_k):
        columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        place = (b, tile_m, tile_k, M, K)
        s = _add_chunk(x_ptr, residual_ptr, sum_ptr, place, lines, columns, (stride_xb, stride_xm), (stride_rb, stride_rm))
        if NORM[0]:
            distances += tl.sum(s * s, 1)
        else:
            width = tl.sum((columns < K).to(tl.float32), 0)
            middle = tl.sum(s, 1) / width
            distance = tl.where((columns < K)[None, :], s - middle[:, None], 0.0)
            step = middle - mean
            mean += step * (width / (before + width))
            distances += tl.sum(distance * distance, 1) + step * step * (before * width / (before + width))
            before += width
    if not NORM[0]:
        tl.store(mean_ptr + b * M + lines, mean, mask=lines < M)
    tl.store(rstd_ptr + b * M + lines, 1.0 / tl.sqrt_rn(distances / K + eps), mask=lines < M)
    tl.debug_barrier()  # s, mean and rstd were written by other threads of this program

    into = (q_ptr, t_ptr, scale_ptr, made_ptr, record_ptr, sums_ptr)
    inv = tensor_inverse(into, HOW)
    words = tile_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
    norm, strides = (sum_ptr + b * M * K, mean_ptr, rstd_ptr, weight_ptr, bias_ptr), (0, K, 1)
    for tile_k in range(tiles_k):
        place = (b, tile_m, tile_k, M, K)
        at = (4 * words, words, tile_k * BLOCK_K + tl.arange(0, BLOCK_K))
        cast_tile(norm, into, (rng_ptr, key), place, at, strides, inv, NORM, BLOCK_M, HOW)


def add_norm_cast(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    format: str | Format,
    kind: str = "rms",
    eps: float = 1e-6,
    scale: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    round_first: bool = False,
    record: Tensor | None = None,
    counts: bool = False,
    current: bool = False,
    made_scale: Tensor | None = None,
    power_of_two: bool = False,
    scale_eps: float = 1e-12,
) -> tuple[Tensor, Pair, Tensor | None, Tensor]:
    """(s, (q, qT), mean or None, rstd) of s = x + residual, both of one dtype and shape [..., M, K]; s is contiguous.

    The arguments are those of `norm_cast`, without `amax`, which is record[:1].
    """
    given = check_norm("add_norm_cast", x, weight, bias, kind, scale is not None and current)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise KernelError(f"add_norm_cast: x {x.dtype} {tuple(x.shape)} and residual {residual.dtype} {tuple(residual.shape)} must agree")
    record, recording = check_record("add_norm_cast", record, None, counts)
    rstd, mean = statistics_of(x, kind)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    fp8, left, right, norm = hardware_format(format), plain_matrices(x), plain_matrices(residual), (kind == "rms", round_first, *given)
    parts = None
    if current and x.numel() > 0:
        parts = statistics(left, right, total, weight, bias, mean, rstd, eps, norm, True)
    scaling = scaling_of("add_norm_cast", x, scale, current, parts, made_scale, power_of_two, scale_eps)
    result = Result.empty(x, fp8, layout, scaling, record)
    if current or x.numel() == 0:
        launch_cast(matrices(total), mean, rstd, weight, bias, result, fp8, how, norm, recording)
        return total, result.pair, mean, rstd
    block_m, block_k, warps = _CONFIG
    launch(
        _add_norm_kernel,
        (left.tile_rows(block_m),),
        (
            left.x,
            right.x,
            total,
            rstd if mean is None else mean,
            rstd,
            x if weight is None else weight,
            x if bias is None else bias,
            *result.pointers(x),
            x if how.rng is None else how.rng,
            how.signed_key,
            eps,
            left.m,
            left.k,
            *left.strides[:2],
            *right.strides[:2],
        ),
        {"NORM": norm, "HOW": result.how(fp8, how, left, recording), "BLOCK_M": block_m, "BLOCK_K": block_k},
        num_warps=warps,
    )
    return total, result.pair, mean, rstd
