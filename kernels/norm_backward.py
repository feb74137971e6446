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

from typing import NamedTuple

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
    _check(where, dy, x, weight, mean, rstd, add, format, scale, current)
    record, recording = check_record(where, record, None, counts)
    fp8, read = hardware_format(format or "e5m2"), _Read.of(dy, x, add, weight, mean, rstd, round_first)
    outs = [out for out in (weight_grad, bias_grad) if out is not None]
    for out in (*outs, row_sum):
        check_sum(where, out, read.x.k)
    row_sums, parts = _row_sums(read, current)
    scaling = scaling_of(where, x, scale, current, parts, made_scale, power_of_two, scale_eps)
    tile_rows = read.x.tile_rows(_CONFIG[0])
    sums = None if row_sum is None else partials(x, tile_rows, read.x.k)
    result = Result(None, None, scaling, record, sums) if format is None else Result.empty(x, fp8, layout, scaling, record, sums)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if write or format is None else None
    if x.numel() == 0:
        scaling.of_nothing(fp8)
        for out in (*outs, row_sum):
            _ = None if out is None else out.zero_()
        return result.pair, dx
    gradients = partials(x, tile_rows, read.x.k, len(outs)) if outs else None
    which = (weight_grad is not None) + 2 * (bias_grad is not None)
    _tiles(read, row_sums, dx, gradients, which, result, result.how(fp8, how, read.x, recording), how)
    if gradients is not None:
        sum_partials(gradients, *outs)
    if sums is not None and row_sum is not None:
        sum_partials(sums, row_sum)
    return result.pair, dx


def _check(
    where: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    add: Tensor | None,
    format: str | Format | None,
    scale: Tensor | None,
    current: bool,
) -> None:
    check_norm(where, x, weight, None, "layer", scale is not None and current)
    same = all(part is None or (part.shape == x.shape and part.dtype == x.dtype) for part in (dy, add))
    rows = _rows(x, rstd)
    if not same or any(part is not None and (part.numel() != rows or part.dtype != torch.float32) for part in (mean, rstd)):
        raise KernelError(f"{where}: dy and add must be like x, {x.dtype} {tuple(x.shape)}, mean and rstd float32 [..., M, 1]")
    if format is None and (scale is not None or current):
        raise KernelError(f"{where}: a scale without a format")


def _rows(x: Tensor, rstd: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.numel() else rstd.numel()


class _Read(NamedTuple):
    """What both kernels read. seen: dy, x and add, for which x stands where there is none; norm: NORM."""

    seen: list[Matrices]
    weight: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    rows: int
    norm: tuple[bool, bool, bool]
    adds: bool

    @classmethod
    def of(
        cls,
        dy: Tensor,
        x: Tensor,
        add: Tensor | None,
        weight: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        round_first: bool,
    ) -> _Read:
        seen = [plain_matrices(x if part is None else part) for part in (dy, x, add)]
        return cls(seen, weight, mean, rstd, _rows(x, rstd), (mean is None, round_first, weight is not None), add is not None)

    @property
    def x(self) -> Matrices:
        return self.seen[1]

    def pointers(self, anything: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
        """To all of it, then to `further`; `anything` for what is not there."""
        rest = (self.weight, self.mean, self.rstd, *further)
        return *(part.x for part in self.seen), *(anything if part is None else part for part in rest)

    def sizes(self) -> tuple[int, ...]:
        """Rows, M, K and the strides by batch and by row."""
        return self.rows, self.x.m, self.x.k, *(stride for part in self.seen for stride in part.strides[:2])


def _row_sums(read: _Read, current: bool) -> tuple[Tensor, Tensor | None]:
    """The first kernel: both sums of each row, float32 [2, rows]; and, if `current`, partial amaxes of dx."""
    rows, k, device = read.rows, read.x.k, read.rstd.device
    row_sums = torch.empty((2, rows), dtype=torch.float32, device=device)
    if read.x.x.numel() == 0:
        return row_sums, None
    programs = part_count(rows) if current else rows
    parts = torch.empty(programs, dtype=torch.float32, device=device) if current else None
    block, warps = block_of(k)
    launch(
        row_sums_kernel,
        (programs,),
        (*read.pointers(read.rstd, row_sums, parts), *read.sizes()),
        {"NORM": read.norm, "ADD": read.adds, "AMAX": current, "WHOLE": k <= block, "BLOCK": block},
        num_warps=warps,
    )
    return row_sums, parts


def _tiles(
    read: _Read,
    row_sums: Tensor,
    dx: Tensor | None,
    gradients: Tensor | None,
    which: int,
    result: Result,
    flags: tuple[object, ...],
    how: Rounding,
) -> None:
    """The second kernel, from the sums of the first. which: GRADIENTS, for whose partial sums `gradients` has room."""
    block_m, block_k, warps = _CONFIG
    x = read.x.x
    launch(
        norm_backward_kernel,
        (read.x.tiles(block_m, block_k),),
        (
            *read.pointers(x, row_sums, dx, gradients),
            *result.pointers(x),
            x if how.rng is None else how.rng,
            how.signed_key,
            *read.sizes(),
        ),
        {
            "NORM": read.norm,
            "ADD": read.adds,
            "WRITE": dx is not None,
            "GRADIENTS": which,
            "HOW": flags,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
