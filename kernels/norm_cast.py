# mypy: allow-untyped-defs, allow-incomplete-defs
"""LayerNorm and RMSNorm that write FP8: the norm's output never goes to memory in high precision.

    rstd = 1 / sqrt(mean((x - mean)^2) + eps)       mean = 0 for rms; per row of x [..., M, K], in float32
    y    = (x - mean) * rstd * weight + bias        rounded to x's dtype as the unfused operator does
    q, qT of y, amax(y)                             as `cast` writes them

Two kernels: the statistics of each row, which backward wants anyway, then tiles in both layouts (see `quarters`); the second read of
x comes out of the L2 cache where x fits it. Scales are given (delayed scaling, or none).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.activation_cast import Pair, flags, write_result
from fp8fx.kernels.cast import NEAREST, Rounding
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.layout import batches, check_input, transposed_shape
from fp8fx.kernels.quarters import byte_views, load_quarter, locate
from fp8fx.kernels.scale import inverse

_CONFIG = (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps


@triton.jit
def _statistics_kernel(x_ptr, mean_ptr, rstd_ptr, eps, M, K, stride_xb, stride_xm, stride_xk, RMS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row // M * stride_xb + row % M * stride_xm
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mean = 0.0
    if not RMS:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            total += tl.load(x_ptr + (start + columns) * stride_xk, mask=start + columns < K, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / K
        tl.store(mean_ptr + row, mean)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        inside = start + columns < K
        distance = tl.load(x_ptr + (start + columns) * stride_xk, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, distance * distance, 0.0)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / K + eps))


@triton.jit
def _normalize(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows, columns, strides, RMS: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """One quarter of y, float32 with the values that x's dtype holds."""
    dtype = x_ptr.dtype.element_ty
    b, _, _, M, _ = place
    x = load_quarter(x_ptr, place, rows, columns, strides)
    if not RMS:
        x = x - tl.load(mean_ptr + b * M + rows, mask=rows < M, other=0.0)[:, None]
    x = x * tl.load(rstd_ptr + b * M + rows, mask=rows < M, other=0.0)[:, None]
    if ROUND_FIRST:
        x = x.to(dtype).to(tl.float32)
    return (x * weight[None, :] + bias[None, :]).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["key"])
def _norm_cast_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    amax_ptr,
    rng_ptr,
    key,
    M,
    K,
    M_WORDS,
    stride_xb,
    stride_xm,
    stride_xk,
    RMS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    inside = columns < K
    weight, bias = tl.full([BLOCK_K], 1.0, tl.float32), tl.zeros([BLOCK_K], tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    inv = 1.0 if HOW[6] else inverse(tl.load(scale_ptr))
    strides = (stride_xb, stride_xm, stride_xk)
    # Outside of x, and there only, y would be the bias: neither stored nor counted.
    y0 = _normalize(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows, columns, strides, RMS, ROUND_FIRST)
    y1 = _normalize(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 1, columns, strides, RMS, ROUND_FIRST)
    y2 = _normalize(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 2, columns, strides, RMS, ROUND_FIRST)
    y3 = _normalize(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 3, columns, strides, RMS, ROUND_FIRST)
    y0 = tl.where((rows < M)[:, None], y0, 0.0)
    y1 = tl.where((rows + 1 < M)[:, None], y1, 0.0)
    y2 = tl.where((rows + 2 < M)[:, None], y2, 0.0)
    y3 = tl.where((rows + 3 < M)[:, None], y3, 0.0)
    into = (q_ptr, t_ptr, amax_ptr, M_WORDS)
    write_result(y0, y1, y2, y3, into, (rng_ptr, key), place, (rows, words, columns), inv, ROWS, TRANSPOSED, HOW)


def norm_cast(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    format: str | Format,
    kind: str = "rms",
    eps: float = 1e-6,
    scale: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    amax: Tensor | None = None,
    round_first: bool = False,
) -> tuple[Pair, Tensor | None, Tensor]:
    """((q [..., M, K], qT [..., K, M]), mean or None, rstd) of the norm over the last dimension of bf16, fp16 or fp32 `x`.

    kind: `layer` or `rms`. weight, bias: [K], any float dtype. mean (None for rms) and rstd: float32 [..., M, 1]. scale: float32 with
    one element, or None; amax: float32 with one element, raised to amax(y). round_first: the normalized x is rounded to its dtype
    before the weight multiplies it, as Llama's RMSNorm does.
    """
    check_input(x, "norm_cast")
    k = x.shape[-1]
    if kind not in ("layer", "rms") or any(
        part is not None and (part.shape != (k,) or not part.is_contiguous()) for part in (weight, bias)
    ):
        raise KernelError(f"norm_cast: {kind!r} of {tuple(x.shape)}: expected layer or rms, with weight and bias [{k}]")
    fp8, rows, transposed = hardware_format(format), layout != "transposed", layout != "rows"
    q = torch.empty(x.shape, dtype=fp8.torch_dtype, device=x.device) if rows else None
    t = torch.empty(transposed_shape(x.shape), dtype=fp8.torch_dtype, device=x.device) if transposed else None
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    if x.numel() == 0:
        return (q, t), mean, rstd
    grid_x = batches(x)
    count, m, _ = grid_x.shape
    first = rstd if mean is None else mean
    rms = kind == "rms"
    block = min(triton.next_power_of_2(k), 4096)
    _statistics_kernel[(count * m,)](grid_x, first, rstd, eps, m, k, *grid_x.stride(), RMS=rms, BLOCK=block, num_warps=4)
    block_m, block_k, warps = _CONFIG
    codes, _ = byte_views(x, q, t)
    _norm_cast_kernel[(count * triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
        grid_x,
        first,
        rstd,
        x if weight is None else weight,
        x if bias is None else bias,
        *codes,
        x if scale is None else scale,
        x if amax is None else amax.view(torch.int32),
        x if how.rng is None else how.rng,
        how.signed_key,
        m,
        k,
        m // 4,
        *grid_x.stride(),
        RMS=rms,
        ROUND_FIRST=round_first,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROWS=rows,
        TRANSPOSED=transposed,
        HOW=flags(fp8, how, m, k, transposed, amax, scale),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return (q, t), mean, rstd
