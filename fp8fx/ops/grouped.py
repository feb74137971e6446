"""grouped_mm: rows of X in consecutive groups, each multiplied by a matrix of its own: the experts of a mixture.

    grouped_mm(x [S, K], w [E, K, N], offs [E], input, weight, meter, scales, rng, site, input_spec, weight_spec, backward, dtype)
        -> y [S, N]
    y[offs[e - 1] : offs[e]] = x[offs[e - 1] : offs[e]] @ w[e]

`offs` holds where each group ends (int32 or int64, ascending); rows from offs[-1] on belong to no group and are zero, where
`torch.nn.functional.grouped_mm` leaves them undefined. One scale serves all rows, and one all experts: a scale per tensor factors out
of all three products, whose groups are different slices of the same two tensors.

    scaled_grouped_mm(a [S, K], b [E, K, N], offs) -> [S, N]       the output and grad_input GEMMs
    scaled_grouped_mm(a [S, K], b [S, N], offs) -> [E, K, N]       grad_weight: a sum over the rows of each group
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fp8fx.ops.library import define
from fp8fx.ops.linear import Saved
from fp8fx.ops.operands import Backward, Operand, backward_operand, forward_operand
from fp8fx.ops.scaled_mm import apply_scales, operand
from fp8fx.spec import SiteSpec


def groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of every group that has rows."""
    start = 0
    for group, end in enumerate(offs.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = max(start, end)


def grouped_product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The two forms of the module docstring, in the operands' own dtype; a group without rows gives nothing, or a zero matrix."""
    if b.dim() == 3:
        result = a.new_zeros((a.shape[0], b.shape[2]))
        for group, rows in groups(offs):
            result[rows] = a[rows] @ b[group]
        return result
    result = a.new_zeros((offs.shape[0], a.shape[1], b.shape[1]))
    for group, rows in groups(offs):
        result[group] = a[rows].mT @ b[rows]
    return result


def scaled_grouped_mm_reference(
    a: Tensor,
    scale_a: Tensor | None,
    format_a: str,
    b: Tensor,
    scale_b: Tensor | None,
    format_b: str,
    offs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Products of codes accumulated in fp32, times the scales, cast to `dtype` once. A format "" is a high-precision operand."""
    result = grouped_product(operand(a, format_a), operand(b, format_b), offs)
    return apply_scales(result, scale_a, scale_b).to(dtype)


def scaled_grouped_mm_fake(
    a: Tensor, scale_a: Tensor | None, format_a: str, b: Tensor, scale_b: Tensor | None, format_b: str, offs: Tensor, dtype: torch.dtype
) -> Tensor:
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (offs.shape[0], a.shape[1], b.shape[1])
    return a.new_empty(shape, dtype=dtype)


scaled_grouped_mm = define(
    "scaled_grouped_mm(Tensor a, Tensor? scale_a, str format_a, Tensor b, Tensor? scale_b, str format_b, Tensor offs,"
    " ScalarType dtype) -> Tensor",
    scaled_grouped_mm_reference,
    scaled_grouped_mm_fake,
)


def grouped_mm_reference(
    x: Tensor,
    w: Tensor,
    offs: Tensor,
    input: list[Tensor],
    weight: list[Tensor],
    meter: Tensor | None,
    scales: Tensor | None,
    rng: Tensor | None,
    site: str,
    input_spec: str,
    weight_spec: str,
    backward: str,
    dtype: torch.dtype,
) -> Tensor:
    if "output" not in SiteSpec.parse_backward(backward).gemms:
        return grouped_product(x.to(dtype), w.to(dtype), offs)
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec)
    return scaled_grouped_mm_reference(left.values, left.scale, left.format, right.values, right.scale, right.format, offs, dtype)


def grouped_mm_fake(x: Tensor, w: Tensor, offs: Tensor, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[2]), dtype=rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, offs, input, weight, _, scales, rng, ctx.site, ctx.input_spec, ctx.weight_spec, backward, _ = inputs
    ctx.spec = SiteSpec.parse_backward(backward)
    ctx.dtypes = (x.dtype, w.dtype)
    ctx.save_for_backward(*Saved.of(x, w, input, weight, ctx.spec.replace(save_for_backward="fp8")).tensors(), offs, scales, rng)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, offs, scales, rng = ctx.saved_tensors
    saved, needs = Saved.restore(tuple(tensors)), ctx.needs_input_grad
    state = Backward(ctx.site, ctx.spec, rng, scales)
    grad = grad.contiguous()
    quantized = state.quantize(grad, [-1])
    dx = dw = None
    if needs[0]:
        w = _operand(saved.weight, saved.w, ctx.weight_spec)
        dx = _product(state, "grad_input", _read(state, "grad_input", quantized, grad), w.mT, offs, ctx.dtypes[0])
    if needs[1]:
        x = _operand(saved.input, saved.x, ctx.input_spec)
        dw = _product(state, "grad_weight", x, _read(state, "grad_weight", quantized, grad), offs, ctx.dtypes[1])
    row = state.statistics(grad) if needs[5] else None
    return dx, dw, None, None, None, row, *([None] * 7)


def _operand(pair: list[Tensor], kept: Tensor | None, spec: str) -> Operand:
    return backward_operand(pair, spec) if kept is None else Operand(kept)


def _read(state: Backward, role: str, quantized: Operand, grad: Tensor) -> Operand:
    return quantized if state.fp8(role) else Operand(grad)


def _product(state: Backward, role: str, a: Operand, b: Operand, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """One gradient GEMM, rounded once from the fp32 accumulator if its role says so."""
    accumulated = torch.float32 if getattr(state.spec, role) is not None else dtype
    result = scaled_grouped_mm(a.values, a.scale, a.format, b.values, b.scale, b.format, offs, accumulated)
    return state.round(result, role, dtype)


grouped_mm = define(
    "grouped_mm(Tensor x, Tensor w, Tensor offs, Tensor[] input, Tensor[] weight, Tensor? meter, Tensor? scales, Tensor? rng,"
    " str site, str input_spec, str weight_spec, str backward, ScalarType dtype) -> Tensor",
    grouped_mm_reference,
    grouped_mm_fake,
    setup_context=_setup,
    backward=_backward,
)
