# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast_block: current scaling with one scale per block (1x128, 128x128, ...), amax, scale and codes in one read of x.

    amax[i, j]  = max |x| over the finite elements of block (i, j)
    scale[i, j] = current_scale(amax[i, j])
    q           = encode(float32(x) * inv_scale of its block)       [..., M, K] row-major
    qT          = the same under blocks of its own, transposed      [..., K, M] row-major

The GEMM that reads qT contracts over M, so 1x128 blocks of x for q go with 128x1 blocks of x for qT; 128x128 blocks serve both, and
q and qT then share codes. A program's tile holds whole blocks. Reference: `fp8fx.numerics.quantize_tensor`, equal byte for byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fp8fx.kernels.cast import Quantized, Rounding
from fp8fx.kernels.codes import encode, finite_magnitude_bits, hardware_format, random_tile
from fp8fx.kernels.layout import batches, check_input, transposed_shape
from fp8fx.kernels.scale import current_scale, inverse
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format

# largest block side along M -> BLOCK_M, BLOCK_K, num_warps
_CONFIGS = {32: (32, 128, 4), 128: (128, 128, 8)}


@triton.jit
def _scale_blocks(
    x,
    amax_ptr,
    scale_ptr,
    eps,
    b,
    tile_m,
    tile_k,
    M,
    K,
    FMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x * inv_scale of each R x C block of the tile; stores the blocks' amax and scale."""
    HIGH: tl.constexpr = BLOCK_M // R
    WIDE: tl.constexpr = BLOCK_K // C
    bits = finite_magnitude_bits(x).reshape(HIGH, R, WIDE, C)
    amax = tl.max(tl.max(bits, 3), 1).to(tl.float32, bitcast=True)
    scale = current_scale(amax, eps, FMAX, POWER_OF_TWO)
    high, wide = tl.cdiv(M, R), tl.cdiv(K, C)
    i, j = tile_m * HIGH + tl.arange(0, HIGH), tile_k * WIDE + tl.arange(0, WIDE)
    at = (b * high + i)[:, None] * wide + j[None, :]
    inside = (i < high)[:, None] & (j < wide)[None, :]
    tl.store(amax_ptr + at, amax, mask=inside)
    tl.store(scale_ptr + at, scale, mask=inside)
    y = x.reshape(HIGH, R, WIDE, C) * inverse(scale)[:, None, :, None]
    return y.reshape(BLOCK_M, BLOCK_K)


@triton.jit(do_not_specialize=["key"])
def _cast_block_kernel(
    x_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    t_ptr,
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
    ROWS: tl.constexpr,  # q is wanted
    TRANSPOSED: tl.constexpr,  # qT is wanted
    R: tl.constexpr,
    C: tl.constexpr,
    R_T: tl.constexpr,
    C_T: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NONFINITE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    FMAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    tiles_k, tiles_m = tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // (tiles_k * tiles_m)).to(tl.int64)
    tile_m, tile_k = (pid // tiles_k) % tiles_m, pid % tiles_k
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    row_inside, column_inside = rows < M, columns < K
    rows_64, columns_64 = rows.to(tl.int64), columns.to(tl.int64)
    at = b * stride_xb + rows_64[:, None] * stride_xm + columns_64[None, :] * stride_xk
    inside = row_inside[:, None] & column_inside[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        bits = random_tile(rng_ptr, key, b * M + rows_64, tile_k * BLOCK_K, K, BLOCK_M, BLOCK_K, GROUPED)
    SHARED: tl.constexpr = ROWS and R == R_T and C == C_T
    codes = tl.zeros([BLOCK_M, BLOCK_K], tl.uint8)
    if ROWS:
        y = _scale_blocks(x, amax_ptr, scale_ptr, eps, b, tile_m, tile_k, M, K, FMAX, POWER_OF_TWO, R, C, BLOCK_M, BLOCK_K)
        codes = encode(y, x, bits, E5M2, STOCHASTIC, NONFINITE)
        tl.store(q_ptr + (b * M + rows_64)[:, None] * K + columns[None, :], codes, mask=inside)
    if TRANSPOSED:
        if not SHARED:
            y = _scale_blocks(x, amax_t_ptr, scale_t_ptr, eps, b, tile_m, tile_k, M, K, FMAX, POWER_OF_TWO, R_T, C_T, BLOCK_M, BLOCK_K)
            codes = encode(y, x, bits, E5M2, STOCHASTIC, NONFINITE)
        at_t = (b * K + columns_64)[:, None] * M + rows[None, :]
        tl.store(t_ptr + at_t, tl.trans(codes), mask=column_inside[:, None] & row_inside[None, :])


def cast_block(
    x: Tensor,
    format: str | Format,
    block: tuple[int, int] = (1, 128),
    block_t: tuple[int, int] | None = None,
    layout: str = "rows",
    how: Rounding = Rounding(),  # noqa: B008 - frozen
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> Quantized:
    """Codes of bf16, fp16 or fp32 `x` [..., M, K] with a scale per `block` (rows, columns) of x for q, per `block_t` of x for qT.

    Sides are powers of two up to 128. block_t None: `block` turned, what the GEMM contracting over M wants. amax and scale are
    float32 [..., ceil(M / rows), ceil(K / columns)], those of qT too (in x's axes). layout: rows, transposed or both.
    """
    check_input(x, "cast_block")
    block_t = (block[1], block[0]) if block_t is None else block_t
    if x.dim() < 2 or any(side & (side - 1) or not 1 <= side <= 128 for side in (*block, *block_t)):
        raise KernelError(f"cast_block: blocks {block} and {block_t} must have sides of powers of two up to 128, and x two dimensions")
    fp8 = hardware_format(format)
    rows, transposed = layout != "transposed", layout != "rows"
    q = torch.empty(x.shape, dtype=fp8.torch_dtype, device=x.device) if rows else None
    t = torch.empty(transposed_shape(x.shape), dtype=fp8.torch_dtype, device=x.device) if transposed else None
    amax, scale = _blocks(x, block) if rows else (None, None)
    shared = rows and block == block_t
    amax_t, scale_t = (amax, scale) if shared else _blocks(x, block_t) if transposed else (None, None)
    if x.numel() > 0:
        grid_x = batches(x)
        count, m, k = grid_x.shape
        used = ([block] if rows else []) + ([block_t] if transposed else [])
        block_m, block_k, warps = _CONFIGS[32 if max(r for r, _ in used) <= 32 and not transposed else 128]
        codes = [None if part is None else part.view(torch.uint8) for part in (q, t)]
        pointers = [x if part is None else part for part in (codes[0], amax, scale, codes[1], amax_t, scale_t)]
        _cast_block_kernel[(count * triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
            grid_x,
            *pointers,
            x if how.rng is None else how.rng,
            how.signed_key,
            eps,
            m,
            k,
            *grid_x.stride(),
            ROWS=rows,
            TRANSPOSED=transposed,
            R=block[0],
            C=block[1],
            R_T=block_t[0],
            C_T=block_t[1],
            POWER_OF_TWO=power_of_two,
            E5M2=fp8.name == "e5m2",
            STOCHASTIC=how.rounding == "stochastic",
            NONFINITE=how.overflow == "nonfinite",
            GROUPED=k % 4 == 0,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=warps,
        )
    return Quantized(q, t, scale, scale_t, amax, amax_t)


def _blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Empty amax and scale."""
    shape = (*x.shape[:-2], triton.cdiv(x.shape[-2], block[0]), triton.cdiv(x.shape[-1], block[1]))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
