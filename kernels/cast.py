"""cast: a high-precision tensor to FP8 codes, their transpose and amax, in one read of it.

    q   [..., M, K] = encode(float32(x) * inv_scale)        row-major
    qT  [..., K, M] = the same codes transposed             row-major: the layout in which the other GEMM contracts;
                                                            rows padded to a multiple of 16 bytes (`layout.pitch`)
    record          : amax(x), and counts of zeros          see `records`
    bias_grad [K]   = sum of x over its rows                see `column_sums`

Hopper's FP8 matrix instructions take both operands with the contraction innermost, and forward and backward contract over
different axes, so each operand is wanted in both layouts. With one scale per tensor both hold the same codes; scales along the
contraction (`row` for q, `column` for qT) give each its own. Scales are read, or made from an amax that was just measured, in
this kernel. The random bits of stochastic rounding belong to the element of x, so q and qT share each decision.

Reference: `fp8fx.numerics.quantize_scaled`, equal byte for byte.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.amax import amax_each, amax_parts
from fp8fx.kernels.cast_kernel import cast_kernel
from fp8fx.kernels.cast_rows import MOST, cast_rows
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.column_sums import check_sum, partials, sum_partials
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import AXES, axis_shape, axis_size, check_input, long_rows, matrices
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import LAYOUTS, Result, Scaling
from fp8fx.kernels.rounding import NEAREST, Rounding
from fp8fx.kernels.scale import compute_scale

__all__ = ["LAYOUTS", "NEAREST", "Quantized", "Rounding", "cast", "cast_current"]

# what is written -> BLOCK_M, BLOCK_K, num_warps. `small`: both layouts with counts, or of odd rows, which want registers; `axes`: under
# scales of rows or columns, which every tile makes anew; `flat`: any contiguous tensor with one scale, as long rows.
_CONFIGS = {
    "rows": (64, 128, 4),
    "transposed": (64, 64, 4),
    "both": (128, 64, 4),
    "small": (64, 64, 4),
    "axes": (64, 128, 4),
    "flat": (4, 4096, 8),
}


class Quantized(NamedTuple):
    """Codes, scales and amax in both layouts; None where not asked for. `*_t` belong to qT and have the shapes of x's own axes."""

    q: Tensor | None
    q_t: Tensor | None
    scale: Tensor | None
    scale_t: Tensor | None
    amax: Tensor | None
    amax_t: Tensor | None


def cast(
    x: Tensor,
    format: str | Format,
    scale: Tensor | None = None,
    granularity: str = "tensor",
    layout: str = "rows",
    how: Rounding = NEAREST,
    amax: Tensor | None = None,
    record: Tensor | None = None,
    counts: bool = False,
    bias_grad: Tensor | None = None,
    from_amax: bool = False,
    made_scale: Tensor | None = None,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor | None, Tensor | None]:
    """(q [..., M, K], qT [..., K, M]) of bf16, fp16 or fp32 `x`, the one that `layout` (rows, transposed, both) leaves out None.

    scale: the dequantization multiplier, float32 with one element (granularity `tensor`), one per row or one per column; None: x
    itself is rounded. from_amax: `scale` is the amax of x instead (granularity `tensor`; also partial ones, see `amax_parts`), the
    scale is made from it with `power_of_two` and `eps` and stored in `made_scale`, float32 with one element.
    record: float32 [3], see `records`; counts: also of zeros; amax: a record of one element, amax alone. bias_grad: float [K], set to
    the sum of x over its rows.
    """
    check_input(x, "cast")
    record, recording = check_record("cast", record, amax, counts)
    axis = 3 if scale is None else AXES[granularity]
    axes = (axis if layout != "transposed" else -1, {"rows": -1, "both": -2, "transposed": axis}[layout])
    scaling = Scaling(scale, from_amax, made_scale, power_of_two, eps)
    if axis in (0, 3):
        scaling.check("cast")
    elif scale is not None:
        expected = axis_size(matrices(x), granularity)
        if scale.dtype != torch.float32 or scale.numel() != expected or from_amax:
            raise KernelError(f"cast: scale must be float32 with {expected} elements, got {scale.dtype} of shape {tuple(scale.shape)}")
        scaling = Scaling(scale.contiguous())
    fp8 = hardware_format(format)
    result = Result.empty(x, fp8, layout, scaling, record)
    _launch(x, fp8, axes, result, scaling, how, recording, bias_grad)
    if x.numel() == 0:
        scaling.of_nothing(fp8)
    return result.pair


def cast_current(
    x: Tensor,
    format: str | Format,
    granularity: str = "tensor",
    granularity_t: str | None = None,
    layout: str = "rows",
    how: Rounding = NEAREST,
    power_of_two: bool = False,
    eps: float = 1e-12,
    record: Tensor | None = None,
    counts: bool = False,
    bias_grad: Tensor | None = None,
) -> Quantized:
    """Current scaling: amax in one read of x, scales and codes in a second (scales per row of q alone: see `cast_rows`).

    granularity: `tensor`, `row` or `column` for q, granularity_t likewise for qT.

    With layout `both` and granularity_t None, or the same, q and qT share codes and scale. Scales have the shapes of
    `fp8fx.numerics.amax`: [], [..., M, 1] or [..., 1, K], also those of qT. record, counts and bias_grad as for `cast`.
    """
    check_input(x, "cast_current")
    own_t = granularity if granularity_t is None else granularity_t
    sides = {"rows": (granularity, None), "transposed": (None, own_t), "both": (granularity, own_t)}[layout]
    wanted = tuple(dict.fromkeys(side for side in sides if side is not None))
    if wanted == ("tensor",):
        # Compilers ask that a tensor starts on a multiple of 16 bytes.
        made = torch.empty_strided((2,), (4,), dtype=torch.float32, device=x.device)
        parts = amax_parts(x)
        q, t = cast(x, format, parts, "tensor", layout, how, None, record, counts, bias_grad, True, made, power_of_two, eps)
        scale, amax = made.unbind()
        own, turned = ((scale, amax) if side else (None, None) for side in sides)
        return Quantized(q, t, own[0], turned[0], own[1], turned[1])
    record, recording = check_record("cast_current", record, None, counts)
    if sides == ("row", None) and recording < 2 and bias_grad is None and x.dim() > 1 and x.numel() > 0 and x.shape[-1] <= MOST:
        q, scale, amax = cast_rows(x, hardware_format(format), how, power_of_two, eps, record)
        return Quantized(q, None, scale, None, amax, None)
    found = dict(zip(wanted, amax_each(x, wanted), strict=True))
    scales = {g: torch.empty(axis_shape(x.shape, g), dtype=torch.float32, device=x.device) for g in wanted}
    scaling = {g: Scaling(found[g], True, scales[g], power_of_two, eps) for g in wanted}
    first, second = sides
    axes = (-1 if first is None else AXES[first], -1 if second is None else -2 if first == second else AXES[second])
    fp8 = hardware_format(format)
    result = Result.empty(x, fp8, layout, scaling[wanted[0]], record)
    _launch(x, fp8, axes, result, scaling[wanted[-1]], how, recording, bias_grad)
    if x.numel() == 0:
        for g in wanted:
            scales[g].copy_(compute_scale(found[g], format, power_of_two, eps))
    parts_of = [(None, None) if side is None else (scales[side], found[side]) for side in sides]
    return Quantized(*result.pair, parts_of[0][0], parts_of[1][0], parts_of[0][1], parts_of[1][1])


def _written(result: Result, axes: tuple[int, int], crowded: bool, flat: bool) -> str:
    """The key of _CONFIGS. crowded: a tile that writes both layouts needs more registers than usual."""
    if result.t is None:
        return "flat" if flat else "rows"
    if axes[0] in (1, 2) or axes[1] in (1, 2):
        return "axes"
    return "transposed" if result.q is None else "small" if crowded else "both"


def _launch(
    x: Tensor,
    format: Format,
    axes: tuple[int, int],
    result: Result,
    turned: Scaling,
    how: Rounding,
    recording: int,
    bias_grad: Tensor | None,
) -> None:
    """Write `result`; `turned` scales qT. Scales are contiguous float32, indexed by the axis."""
    scaling = result.scaling
    check_sum("cast", bias_grad, x.shape[-1] if x.dim() else 1)
    if x.numel() == 0:
        if bias_grad is not None:
            bias_grad.zero_()
        return
    flat = result.t is None and axes[0] in (0, 3) and bias_grad is None and x.is_contiguous()
    seen = long_rows(x) if flat else matrices(x)
    block_m, block_k, warps = _CONFIGS[_written(result, axes, recording == 2 or seen.k % 4 != 0, flat and seen.k == 4096)]
    sums = None if bias_grad is None else partials(x, seen.tile_rows(block_m), seen.k)
    whole = (axes[1] if axes[0] == -1 else axes[0]) == 0  # two scales of rows are no scale with its amax
    # A pointer that the constexprs switch off is never read: any tensor stands in.
    pointers = (result.q, result.t, scaling.scale, scaling.made, turned.scale, turned.made, result.record, sums, how.rng)
    launch(
        cast_kernel,
        (seen.tiles(block_m, block_k),),
        (seen.x, *(x if part is None else part for part in pointers), how.signed_key, seen.m, seen.k, *seen.strides),
        {
            "AXIS": axes[0],
            "AXIS_T": axes[1],
            "MAKE": (scaling.from_amax, scaling.parts, scaling.power_of_two, scaling.eps, format.max, scaling.and_amax if whole else 0),
            "HOW": (format.name == "e5m2", how.stochastic, how.nonfinite, seen.k % 4 == 0),
            "RECORD": recording,
            "SUMS": sums is not None,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    if sums is not None and bias_grad is not None:
        sum_partials(sums, bias_grad)
