"""The backward of LayerNorm and RMSNorm, writing FP8: what the matrix products before the norm take as their gradient.

    n  = (x - mean) * rstd                 mean = 0 for rms; rounded to x's dtype if the forward rounds there (round_first)
    g  = dy * weight                       likewise
    dx = rstd * (g - sum(g) / K - n * sum(g * n) / K) + add          the second term for layer only; rounded to x's dtype, and once
                                                                     more after `add`, a gradient that reaches x past the norm
    q, qT, record and sum over the rows of dx                        as `cast` writes them; dx itself where it is asked for
    weight_grad = sum of dy * n,  bias_grad = sum of dy              over the rows, in two deterministic steps (see `column_sums`)

Two kernels: the two sums of each row, from the last to the first, and under current scaling the amax of dx, which needs no third read;
then tiles. Reference: autograd of the norm; the order of the sums differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.amax import part_count
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.column_sums import check_sum, partials, sum_partials
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import Matrices, plain_matrices
from fp8fx.kernels.norm_backward_kernels import norm_backward_kernel, row_sums_kernel
from fp8fx.kernels.norm_cast import check_norm, scaling_of
from fp8fx.kernels.norm_statistics import block_of
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import Pair, Result
from fp8fx.kernels.rounding import NEAREST, Rounding

_CONFIG = (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps


def norm_backward_cast(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    format: str | Format | None,
    scale: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    add: Tensor | None = None,
    write: bool = False,
    round_first: bool = False,
    weight_grad: Tensor | None = None,
    bias_grad: Tensor | None = None,
    record: Tensor | None = None,
    counts: bool = False,
    row_sum: Tensor | None = None,
    current: bool = False,
    made_scale: Tensor | None = None,
    power_of_two: bool = False,
    scale_eps: float = 1e-12,
) -> tuple[Pair, Tensor | None]:
    """((q [..., M, K], qT [..., K, M]) of dx, dx [..., M, K] if `write`) from dy and x, bf16, fp16 or fp32 [..., M, K].

    mean, None for rms, and rstd are those of the forward (`norm_cast`), of x or of x + residual. format None: no codes, dx alone, which
    is then written. add: a gradient of x's shape and dtype to be added to dx. weight_grad, bias_grad: float [K], set to the gradients
    of the norm's weight and bias; row_sum: float [K], set to the sum of dx over its rows: the bias gradient of the linear layer whose
    output x is. Scale, record and current scaling as for `norm_cast`.
    """
    where = "norm_backward_cast"
    check_norm(where, x, weight, None, "layer", scale is not None and current)
    same = all(part is None or (part.shape == x.shape and part.dtype == x.dtype) for part in (dy, add))
    rows = x.numel() // x.shape[-1] if x.numel() else rstd.numel()
    if not same or any(part is not None and (part.numel() != rows or part.dtype != torch.float32) for part in (mean, rstd)):
        raise KernelError(f"{where}: dy and add must be like x, {x.dtype} {tuple(x.shape)}, mean and rstd float32 [..., M, 1]")
    if format is None and (scale is not None or current):
        raise KernelError(f"{where}: a scale without a format")
    record, recording = check_record(where, record, None, counts)
    fp8, norm = hardware_format(format or "e5m2"), (mean is None, round_first, weight is not None)
    seen = [plain_matrices(x if part is None else part) for part in (dy, x, add)]
    k, outs = x.shape[-1], [out for out in (weight_grad, bias_grad) if out is not None]
    for out in (*outs, row_sum):
        check_sum(where, out, k)
    row_sums, parts = torch.empty((2, rows), dtype=torch.float32, device=x.device), None
    if x.numel() > 0:
        parts = _row_sums(seen, weight, mean, rstd, row_sums, norm, add is not None, current)
    scaling = scaling_of(where, x, scale, current, parts, made_scale, power_of_two, scale_eps)
    tile_rows = seen[1].tile_rows(_CONFIG[0])
    sums = None if row_sum is None else partials(x, tile_rows, k)
    result = Result(None, None, scaling, record, sums) if format is None else Result.empty(x, fp8, layout, scaling, record, sums)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if write or format is None else None
    if x.numel() == 0:
        scaling.of_nothing(fp8)
        for out in (*outs, row_sum):
            _ = None if out is None else out.zero_()
        return result.pair, dx
    gradients = partials(x, tile_rows, k, len(outs)) if outs else None
    block_m, block_k, warps = _CONFIG
    pointers = (weight, mean, rstd, row_sums, dx, gradients)
    launch(
        norm_backward_kernel,
        (seen[1].tiles(block_m, block_k),),
        (
            *(part.x for part in seen),
            *(x if part is None else part for part in pointers),
            *result.pointers(x),
            x if how.rng is None else how.rng,
            how.signed_key,
            rows,
            seen[1].m,
            k,
            *(stride for part in seen for stride in part.strides[:2]),
        ),
        {
            "NORM": norm,
            "ADD": add is not None,
            "WRITE": dx is not None,
            "GRADIENTS": (weight_grad is not None) + 2 * (bias_grad is not None),
            "HOW": result.how(fp8, how, seen[1], recording),
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    if gradients is not None:
        sum_partials(gradients, *outs)
    if sums is not None and row_sum is not None:
        sum_partials(sums, row_sum)
    return result.pair, dx


def _row_sums(
    seen: list[Matrices],
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    row_sums: Tensor,
    norm: tuple[bool, ...],
    adds: bool,
    amax: bool,
) -> Tensor | None:
    """The first kernel: writes row_sums, returns the partial amaxes of dx if `amax`."""
    rows, k = row_sums.shape[1], seen[1].k
    programs = part_count(rows) if amax else rows
    parts = torch.empty(programs, dtype=torch.float32, device=rstd.device) if amax else None
    block, warps = block_of(k)
    launch(
        row_sums_kernel,
        (programs,),
        (
            *(part.x for part in seen),
            *(rstd if part is None else part for part in (weight, mean, rstd, row_sums, parts)),
            rows,
            seen[1].m,
            k,
            *(stride for part in seen for stride in part.strides[:2]),
        ),
        {"NORM": norm, "ADD": adds, "AMAX": amax, "WHOLE": k <= block, "BLOCK": block},
        num_warps=warps,
    )
    return parts
