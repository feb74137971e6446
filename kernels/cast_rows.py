# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast_rows: current scaling by rows, in one read of x: a program holds whole rows, finds their amax, and encodes what it holds.

    q [..., M, K] = encode(float32(x) / scale of its row)     row-major; scale and amax float32 [..., M, 1]

What `cast_current` does in two reads, for rows of up to 16384 and codes in x's own layout only: weights in forward. The codes, scales and
random bits are its own. Reference: `fp8fx.numerics.quantize_tensor`, equal byte for byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.formats import Format
from fp8fx.kernels.codes import encode, largest_of, magnitude_of, ordered
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import axis_shape, cdiv, ceil_power_of_two, plain_matrices
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.records import amax_bits, merge_amax
from fp8fx.kernels.rounding import Rounding
from fp8fx.kernels.scale import finite_scale, inverse

MOST = 16384  # columns that a program holds
_TILE = 8192  # elements of a tile of several rows


@triton.jit(do_not_specialize=["key"])
def _cast_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    amax_ptr,
    record_ptr,
    rng_ptr,
    key,
    rows_all,
    M,
    K,
    stride_xb,
    stride_xm,
    HOW: tl.constexpr,  # (E5M2, STOCHASTIC, NONFINITE, GROUPED, POWER_OF_TWO, EPS, RECORD)
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    below = rows < rows_all
    inside = below[:, None] & (columns < K)[None, :]
    lines = rows.to(tl.int64)
    start = lines // M * stride_xb + lines % M * stride_xm
    x = tl.load(x_ptr + start[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = magnitude_of(tl.max(ordered(x), 1))
    scale = finite_scale(amax, HOW[5], 57344.0 if HOW[0] else 448.0, HOW[4])
    tl.store(scale_ptr + rows, scale, mask=below)
    tl.store(amax_ptr + rows, amax, mask=below)
    bits = x.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile((rng_ptr, key), lines, 0, K, BLOCK_M, BLOCK_K, HOW[3])
    codes = encode(x * inverse(scale, HOW[4])[:, None], x, bits, HOW[0], HOW[1], HOW[2])
    at = lines[:, None] * K + columns[None, :]
    tl.store(q_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at, codes, mask=inside)
    if HOW[6]:
        merge_amax(record_ptr, amax_bits(record_ptr), largest_of(amax))


def cast_rows(
    x: Tensor, format: Format, how: Rounding, power_of_two: bool, eps: float, record: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, amax) of bf16, fp16 or fp32 `x` [..., M, K] with elements, K at most MOST. record: its first is raised to amax(x)."""
    seen = plain_matrices(x)
    q = torch.empty(x.shape, dtype=format.torch_dtype, device=x.device)
    scale, amax = (torch.empty(axis_shape(x.shape, "row"), dtype=torch.float32, device=x.device) for _ in range(2))
    block_k = ceil_power_of_two(seen.k)
    block_m = max(min(_TILE // block_k, 16), 1)
    rows = seen.batches * seen.m
    launch(
        _cast_rows_kernel,
        (cdiv(rows, block_m),),
        (
            seen.x,
            q,
            scale,
            amax,
            x if record is None else record,
            x if how.rng is None else how.rng,
            how.signed_key,
            rows,
            seen.m,
            seen.k,
            *seen.strides[:2],
        ),
        {
            "HOW": (format.name == "e5m2", how.stochastic, how.nonfinite, seen.k % 4 == 0, power_of_two, eps, record is not None),
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=8 if block_k > 4096 else 4,
    )
    return q, scale, amax
