# mypy: allow-untyped-defs, allow-incomplete-defs
"""round_values: x on the grid of an FP8 format, in x's own dtype: a cast and its way back in one read and one write.

    values [...] = decode(encode(float32(x) / scale)) * scale      one rounding to x's dtype, which holds every unscaled value exactly
    record       = amax(x)                                         see `records`

For what no product ends with (see `scaled_mm_epilogue`): gradients under a scale that must be known first. The scale is given, or made
here from the partial amaxes of x (see `amax_parts`), or there is none. Elementwise: any contiguous x, as long rows.

Reference: `fp8fx.ops.quantize.round_reference`, equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.amax import amax_parts
from fp8fx.kernels.codes import finite_magnitude, hardware_format, largest_of, on_grid
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import check_input, long_rows
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.records import amax_bits, check_record, merge_amax
from fp8fx.kernels.rounding import NEAREST, Rounding
from fp8fx.kernels.scale import current_scale, inverse, largest_part

_CONFIGS = {True: (2, 2048, 8), False: (16, 128, 4)}  # rows of 4096, or not: BLOCK_M, BLOCK_K, num_warps


@triton.jit(do_not_specialize=["key"])
def _round_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    record_ptr,
    rng_ptr,
    key,
    M,
    K,
    HOW: tl.constexpr,  # (E5M2, STOCHASTIC, NONFINITE, GROUPED, SCALED, PARTS, POWER_OF_TWO, EPS, RECORD)
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_m, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None] * K + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if HOW[5]:
        amax = largest_part(scale_ptr, HOW[5])
        scale = current_scale(amax, HOW[7], 57344.0 if HOW[0] else 448.0, HOW[6])
        if HOW[8] and tl.program_id(0) == 0:
            merge_amax(record_ptr, amax_bits(record_ptr), amax)
    else:
        if HOW[4]:
            scale = tl.load(scale_ptr)
        if HOW[8]:
            seen = amax_bits(record_ptr)
            merge_amax(record_ptr, seen, largest_of(finite_magnitude(x)))
    y = x * inverse(scale) if HOW[4] else x
    bits = x.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile((rng_ptr, key), rows, tile_k * BLOCK_K, K, BLOCK_M, BLOCK_K, HOW[3])
    values = on_grid(y, x, bits, HOW[0], HOW[1], HOW[2])
    if HOW[4]:
        values = values * scale
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)


def round_values(
    x: Tensor,
    format: str | Format,
    scale: Tensor | None = None,
    how: Rounding = NEAREST,
    record: Tensor | None = None,
    current: bool = False,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """The values of bf16, fp16 or fp32 `x`, contiguous; x is copied if it is not.

    scale: float32 with one element, or None. current: the scale is made from the amax of x, with `power_of_two` and `eps`.
    record: float32 with at least one element, whose first is raised to the amax of x.
    """
    check_input(x, "round_values")
    record, recording = check_record("round_values", record, None, False)
    if scale is not None and (current or scale.dtype != torch.float32 or scale.numel() != 1):
        raise KernelError(f"round_values: scale is float32 with one element, and not made here too, got {scale.dtype} {tuple(scale.shape)}")
    fp8, x = hardware_format(format), x.contiguous()
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    given = amax_parts(x) if current else scale
    seen = long_rows(x)
    rows = seen.batches * seen.m
    block_m, block_k, warps = _CONFIGS[seen.k == 4096]
    launch(
        _round_kernel,
        (-(-rows // block_m) * -(-seen.k // block_k),),
        (x, out, *(x if part is None else part for part in (given, record, how.rng)), how.signed_key, rows, seen.k),
        {
            "HOW": (
                fp8.name == "e5m2",
                how.stochastic,
                how.nonfinite,
                seen.k % 4 == 0,
                given is not None,
                given.numel() if current and given is not None else 0,
                power_of_two,
                eps,
                recording > 0,
            ),
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    return out
