"""matmul: Y = A B with batch dimensions that broadcast; both operands are usually activations.

    matmul(a, b, left, right, meter, scales, rng, site, left_spec, right_spec, backward, dtype) -> y

`left_spec` and `right_spec` say how A [M, K] and B [K, N] are quantized as they lie: a block of B is rows of K by columns of N.
In `backward`, dA is the GEMM and role `grad_input`, dB `grad_weight`; a gradient is summed over broadcast dimensions before its
role rounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.ops.library import define
from fp8fx.ops.linear import Saved
from fp8fx.ops.operands import Backward, Operand, backward_operand, forward_operand
from fp8fx.ops.scaled_mm import scaled_mm_reference
from fp8fx.spec import ACCUMULATORS, GEMMS, SiteSpec


def matmul_reference(
    a: Tensor,
    b: Tensor,
    left: list[Tensor],
    right: list[Tensor],
    meter: Tensor | None,
    scales: Tensor | None,
    rng: Tensor | None,
    site: str,
    left_spec: str,
    right_spec: str,
    backward: str,
    dtype: torch.dtype,
) -> Tensor:
    """`a` [..., M, K], `b` [..., K, N] -> [..., M, N] in `dtype`."""
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms:
        return a.to(dtype) @ b.to(dtype)
    first, second = forward_operand(a, left, left_spec), forward_operand(b, right, right_spec)
    return scaled_mm_reference(*first.arguments(), *second.arguments(), None, dtype, spec.accumulate[0], rng, site)


def matmul_fake(a: Tensor, b: Tensor, left: list[Tensor], right: list[Tensor], *rest: Any) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, left, right, _, scales, rng, ctx.site, ctx.left_spec, ctx.right_spec, backward, _ = inputs
    ctx.spec = SiteSpec.parse_backward(backward)
    ctx.shapes, ctx.dtypes = (a.shape, b.shape), (a.dtype, b.dtype)
    ctx.save_for_backward(*Saved.of(a, b, left, right, ctx.spec.replace(save_for_backward="fp8")).tensors(), scales, rng)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, scales, rng = ctx.saved_tensors
    saved, needs = Saved.restore(tuple(tensors)), ctx.needs_input_grad
    state = Backward(ctx.site, ctx.spec, rng, scales)
    grad = grad.contiguous()
    by_n = state.quantize(grad, [-1])
    da = db = None
    if needs[0]:
        other = _codes(saved.weight, saved.w, ctx.right_spec)
        da = _product(state, "grad_input", by_n, other.mT, (grad, other.values.mT), ctx.shapes[0], ctx.dtypes[0])
    if needs[1]:
        by_m = by_n if by_n.scale is None or by_n.scale.dim() == 0 else state.quantize_other_axis(grad, [-2])
        other = _codes(saved.input, saved.x, ctx.left_spec)
        db = _product(state, "grad_weight", other.mT, by_m, (other.values.mT, grad), ctx.shapes[1], ctx.dtypes[1])
    row = state.statistics(grad) if needs[4] else None
    return da, db, None, None, row, *([None] * 7)


def _codes(pair: list[Tensor], kept: Tensor | None, spec: str) -> Operand:
    if kept is not None:
        return Operand(kept)
    return backward_operand(pair, spec)


def _product(
    state: Backward, role: str, a: Operand, b: Operand, plain: tuple[Tensor, Tensor], shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """One gradient, in FP8 or in the model's dtype, summed to `shape`, then rounded once."""
    if state.fp8(role):
        wanted = state.spec.accumulate[GEMMS.index(role)]
        result = state.gemm(a, b, torch.float32, "precise" if wanted in ACCUMULATORS else wanted, role)
    else:
        result = plain[0].to(dtype) @ plain[1].to(dtype)
    return state.round(result.sum_to_size(shape), role, dtype)


matmul = define(
    "matmul(Tensor a, Tensor b, Tensor[] left, Tensor[] right, Tensor? meter, Tensor? scales, Tensor? rng,"
    " str site, str left_spec, str right_spec, str backward, ScalarType dtype) -> Tensor",
    matmul_reference,
    matmul_fake,
    setup_context=_setup,
    backward=_backward,
)
