# mypy: allow-untyped-defs, allow-incomplete-defs
"""LayerNorm and RMSNorm that write FP8: the norm's output never goes to memory in high precision.

    rstd = 1 / sqrt(mean((x - mean)^2) + eps)       mean = 0 for rms; per row of x [..., M, K], in float32
    y    = (x - mean) * rstd * weight + bias        rounded to x's dtype as the unfused operator does
    q, qT, record of y                              as `cast` writes them

Two kernels: the statistics of each row, which backward wants anyway, then tiles in both layouts (see `quarters`); the second read of
x comes out of the L2 cache where x fits it. Scales are given (delayed scaling), or made from the amax of y that the first kernel
finds on the way (current scaling), or there is none. `add_norm_cast` also adds a residual to x.

Reference: `fp8fx.ops.norms.norm_cast_reference`; the order of the sums differs.
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
from fp8fx.kernels.layout import Matrices, check_input, plain_matrices
from fp8fx.kernels.norm_statistics import load_vector, normalized, statistics
from fp8fx.kernels.quarters import load_quarter, locate
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import Pair, Result, Scaling, tensor_inverse, write_result
from fp8fx.kernels.rounding import NEAREST, Rounding

_CONFIG = (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps


@triton.jit
def _rows_of(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows, columns, strides, NORM: tl.constexpr):
    """One quarter of y; 0 outside of the matrix."""
    b, _, _, M, _ = place
    x = load_quarter(x_ptr, place, rows, columns, strides)
    mean = 0.0
    if not NORM[0]:
        mean = tl.load(mean_ptr + b * M + rows, mask=rows < M, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + b * M + rows, mask=rows < M, other=0.0)[:, None]
    y = normalized(x, mean, rstd, weight[None, :], bias[None, :], x_ptr.dtype.element_ty, NORM[0], NORM[1])
    # Below the last row, and there only, y would be the bias: neither stored nor counted.
    return tl.where((rows < M)[:, None], y, 0.0)


@triton.jit
def cast_tile(norm, into, random, place, at, strides, inv, NORM: tl.constexpr, BLOCK_M: tl.constexpr, HOW: tl.constexpr):
    """Normalize and write one tile; norm = (x, mean, rstd, weight, bias), NORM = (RMS, ROUND_FIRST, WEIGHT, BIAS)."""
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr = norm
    rows, _, columns = at
    weight = load_vector(weight_ptr, columns, place[4], NORM[2], 1.0)
    bias = load_vector(bias_ptr, columns, place[4], NORM[3], 0.0)
    y0 = _rows_of(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows, columns, strides, NORM)
    y1 = _rows_of(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 1, columns, strides, NORM)
    y2 = _rows_of(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 2, columns, strides, NORM)
    y3 = _rows_of(x_ptr, mean_ptr, rstd_ptr, weight, bias, place, rows + 3, columns, strides, NORM)
    write_result(y0, y1, y2, y3, into, random, place, at, inv, BLOCK_M, HOW)


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
    made_ptr,
    record_ptr,
    sums_ptr,
    rng_ptr,
    key,
    M,
    K,
    stride_xb,
    stride_xm,
    NORM: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    into = (q_ptr, t_ptr, scale_ptr, made_ptr, record_ptr, sums_ptr)
    inv = tensor_inverse(into, HOW)
    norm, strides = (x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr), (stride_xb, stride_xm, 1)
    cast_tile(norm, into, (rng_ptr, key), place, (rows, words, columns), strides, inv, NORM, BLOCK_M, HOW)


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
    record: Tensor | None = None,
    counts: bool = False,
    current: bool = False,
    made_scale: Tensor | None = None,
    power_of_two: bool = False,
    scale_eps: float = 1e-12,
) -> tuple[Pair, Tensor | None, Tensor]:
    """((q [..., M, K], qT [..., K, M]), mean or None, rstd) of the norm over the last dimension of bf16, fp16 or fp32 `x`.

    kind: `layer` or `rms`. weight, bias: [K], any float dtype. mean (None for rms) and rstd: float32 [..., M, 1]. round_first: the
    normalized x is rounded to its dtype before the weight multiplies it, as Llama's RMSNorm does. scale: float32 with one element,
    or None. current: the scale is made from the amax of y, with `power_of_two` and `scale_eps`, and stored in `made_scale`, float32
    with one element; of two, the second gets the amax. record: float32 [3], see `records`; counts: also of zeros; amax: a record of
    one element, amax alone.
    """
    parts = check_norm("norm_cast", x, weight, bias, kind, scale is not None and current)
    record, recording = check_record("norm_cast", record, amax, counts)
    rstd, mean = statistics_of(x, kind)
    fp8, seen, norm = hardware_format(format), plain_matrices(x), (kind == "rms", round_first, *parts)
    found = None
    if x.numel() > 0:
        found = statistics(seen, None, None, weight, bias, mean, rstd, eps, norm, current)
    scaling = scaling_of("norm_cast", x, scale, current, found, made_scale, power_of_two, scale_eps)
    result = Result.empty(x, fp8, layout, scaling, record)
    launch_cast(seen, mean, rstd, weight, bias, result, fp8, how, norm, recording)
    return result.pair, mean, rstd


def check_norm(where: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, two_scales: bool) -> tuple[bool, bool]:
    """Whether there is a weight, and a bias."""
    check_input(x, where)
    if two_scales:
        raise KernelError(f"{where}: current scaling makes the scale: pass scale or current, not both")
    k = x.shape[-1]
    if kind not in ("layer", "rms") or any(
        part is not None and (part.shape != (k,) or not part.is_contiguous()) for part in (weight, bias)
    ):
        raise KernelError(f"{where}: {kind!r} of {tuple(x.shape)}: expected layer or rms, with contiguous weight and bias [{k}]")
    return weight is not None, bias is not None


def statistics_of(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Room for rstd and mean."""
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return rstd, rstd.new_empty(rstd.shape) if kind == "layer" else None


def scaling_of(
    where: str,
    x: Tensor,
    scale: Tensor | None,
    current: bool,
    parts: Tensor | None,
    made: Tensor | None,
    power_of_two: bool,
    eps: float,
) -> Scaling:
    """The scaling of a result whose amax, under current scaling, was measured as `parts`, None of an empty x."""
    if current:
        measured = torch.zeros(1, dtype=torch.float32, device=x.device) if parts is None else parts
        scaling = Scaling(measured, True, made, power_of_two, eps)
    else:
        scaling = Scaling(scale)
    scaling.check(where)
    return scaling


def launch_cast(
    x: Matrices,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Result,
    fp8: Format,
    how: Rounding,
    norm: tuple[bool, ...],
    recording: int,
) -> None:
    """The second kernel, from the statistics of the first."""
    if rstd.numel() == 0 or x.k == 0:
        result.scaling.of_nothing(fp8)
        return
    block_m, block_k, warps = _CONFIG
    pointers = (mean, rstd, weight, bias)
    launch(
        _norm_cast_kernel,
        (x.tiles(block_m, block_k),),
        (
            x.x,
            *(x.x if part is None else part for part in pointers),
            *result.pointers(x.x),
            x.x if how.rng is None else how.rng,
            how.signed_key,
            x.m,
            x.k,
            *x.strides[:2],
        ),
        {"NORM": norm, "HOW": result.how(fp8, how, x, recording), "BLOCK_M": block_m, "BLOCK_K": block_k},
        num_warps=warps,
    )
