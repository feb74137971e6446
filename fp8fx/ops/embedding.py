"""embedding: rows of a quantized table, looked up as codes and then dequantized.

    embedding(index, w, weight, meter, scales, rng, padding_idx, scale_grad_by_freq, site, weight_spec, backward, dtype) -> y

The lookup is the GEMM `output`: in high precision it reads the table itself. The sum is the GEMM `grad_weight`: dY is rounded on
entry (`grad_output`) unless it runs in high precision, summed per row in fp32, and the sum rounded as the role `grad_weight` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops.library import define
from fp8fx.ops.operands import Backward, Operand
from fp8fx.ops.scaled_mm import apply_scales, operand
from fp8fx.spec import SiteSpec, TensorSpec


def embedding_reference(
    index: Tensor,
    w: Tensor,
    weight: list[Tensor],
    meter: Tensor | None,
    scales: Tensor | None,
    rng: Tensor | None,
    padding_idx: int,
    scale_grad_by_freq: bool,
    site: str,
    weight_spec: str,
    backward: str,
    dtype: torch.dtype,
) -> Tensor:
    """`index` integer [...], `w` [rows, D] -> [..., D] in `dtype`. A scale is per tensor () or per row [rows, 1].

    `weight` is [] where the table stays in high precision.
    """
    if not weight or "output" not in SiteSpec.parse_backward(backward).gemms:
        return torch.nn.functional.embedding(index, w).to(dtype)
    q, scale = weight
    codes = torch.nn.functional.embedding(index, q.view(torch.uint8)).view(q.dtype)
    picked = scale if scale.dim() == 0 else scale[index]
    return (numerics.decode(codes, TensorSpec.parse(weight_spec).format) * picked).to(dtype)


def embedding_gradient_reference(
    grad: Tensor, scale: Tensor | None, format: str, index: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """fp32 [rows, D]: the gradient rows summed per table row."""
    dy = operand(grad, format)
    if scale is not None and scale.dim() > 0:  # one scale per token does not factor out of the sum over tokens
        dy, scale = dy * scale, None
    summed = torch.ops.aten.embedding_dense_backward(dy, index, rows, padding_idx, scale_grad_by_freq)
    return apply_scales(summed, scale, None)


embedding_gradient = define(
    "embedding_gradient(Tensor grad, Tensor? scale, str format, Tensor index, SymInt rows, int padding_idx, bool scale_grad_by_freq)"
    " -> Tensor",
    embedding_gradient_reference,
    lambda grad, scale, format, index, rows, *rest: grad.new_empty((rows, grad.shape[-1]), dtype=torch.float32),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    index, w, _, _, scales, rng, ctx.padding_idx, ctx.by_freq, ctx.site, _, backward, _ = inputs
    ctx.spec = SiteSpec.parse_backward(backward)
    ctx.rows, ctx.dtype = w.shape[0], w.dtype
    ctx.save_for_backward(index, scales, rng)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, scales, rng = ctx.saved_tensors
    state = Backward(ctx.site, ctx.spec, rng, scales)
    grad = grad.contiguous()
    measured = state.fp8("grad_weight") or ctx.spec.calibrating
    quantized = state.quantize(grad, [-1]) if measured else Operand(grad)
    summed = embedding_gradient(quantized.values, quantized.scale, quantized.format, index, ctx.rows, ctx.padding_idx, ctx.by_freq)
    dw = state.round(summed, "grad_weight", ctx.dtype)
    row = state.statistics(grad) if ctx.needs_input_grad[3] else None
    return None, dw, None, row, *([None] * 8)


embedding = define(
    "embedding(Tensor index, Tensor w, Tensor[] weight, Tensor? meter, Tensor? scales, Tensor? rng, int padding_idx,"
    " bool scale_grad_by_freq, str site, str weight_spec, str backward, ScalarType dtype) -> Tensor",
    embedding_reference,
    lambda index, w, weight, *rest: w.new_empty((*index.shape, w.shape[1]), dtype=rest[-1]),
    setup_context=_setup,
    backward=_backward,
)
