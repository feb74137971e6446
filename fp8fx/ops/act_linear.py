"""act_linear: linear -> activation -> cast as one operator with one autograd formula. *lower* makes it where a graph runs on kernels.

    act_linear(x, w1, w2, ...)      a = act(x w1^T + b1) * (x w2^T + b2)      -> anchor of a, q, qt, scale, h, u
    w2 None                         a = act(x w1^T + b1)                      u has no elements

`a` is what the next layer multiplies, and it is never written in high precision: its codes are. Saved for backward are the codes of X, and
h and u, which the activation's derivative reads. Backward hands the gradient on in FP8:

    da -> act_backward_cast(da, h, u) -> codes of dh and du, in both layouts, and the bias gradients -> dX, dW1, dW2

Sites, specs, records and lists are those of `linear` with `columns` (ops/linear.py), once for w1 and once for w2. SwiGLU and GeGLU are the
gated forms; the numbers are those of the separate operators, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.ops.casts import LAYOUTS, cast_current_fake, cast_current_reference, cast_fake, cast_reference
from fp8fx.ops.kept import keep
from fp8fx.ops.library import define
from fp8fx.ops.linear import LinearBackward, Saved, linear_reference
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.operands import Backward, Operand, quantized_operand
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import SiteSpec, TensorSpec

Quantized = tuple[Tensor, Tensor, Tensor]  # q, qt, scale; the scale has no elements where it is given, or 1


def cast_of(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> Quantized:
    """`x` cast as `spec` says, with one scale."""
    if TensorSpec.parse(spec).scaling == "current":
        return cast_current_reference(x, spec, rng, site, role, record, layout)[:3]
    return *cast_reference(x, spec, rng, site, role, scale, record, layout), x.new_empty(0, dtype=torch.float32)


def cast_of_fake(x: Tensor, spec: str, layout: str) -> Quantized:
    if TensorSpec.parse(spec).scaling == "current":
        return cast_current_fake(x, spec, None, "", "", None, layout)[:3]
    return *cast_fake(x, spec, None, "", "", None, None, layout), x.new_empty(0, dtype=torch.float32)


def act_linear_reference(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    input: list[Tensor],
    weight1: list[Tensor],
    weight2: list[Tensor],
    record1: Tensor | None,
    record2: Tensor | None,
    scales1: Tensor | None,
    scales2: Tensor | None,
    scale: Tensor | None,
    record: Tensor | None,
    rng: Tensor | None,
    activation: str,
    site1: str,
    site2: str,
    input_spec: str,
    weight1_spec: str,
    weight2_spec: str,
    backward1: str,
    backward2: str,
    spec: str,
    site: str,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """`x` [..., K], `w1` and `w2` [H, K] -> anchor [..., H] of `dtype`; codes of a under `spec` (scale: float32 () if delayed); h and u."""
    h = linear_reference(x, w1, b1, input, weight1, None, None, rng, site1, input_spec, weight1_spec, backward1, dtype)
    u = h.new_empty(0)
    a = ACTIVATIONS[activation][0](h)
    if w2 is not None:
        u = linear_reference(x, w2, b2, input, weight2, None, None, rng, site2, input_spec, weight2_spec, backward2, dtype)
        a = a * u
    return make_anchor(a.shape, a.dtype, a.device), *cast_of(a, spec, rng, site, "input", scale, record, layout), h, u


def act_linear_fake(x: Tensor, w1: Tensor, w2: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    spec, _, layout, dtype = rest[-4:]
    h = x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=dtype)
    u = h.new_empty(0) if w2 is None else torch.empty_like(h)
    return make_anchor(h.shape, dtype, x.device), *cast_of_fake(h, spec, layout), h, u


def act_backward_cast_reference(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    activation: str,
    rng: Tensor | None,
    site1: str,
    site2: str,
    spec: str,
    scale1: Tensor | None,
    scale2: Tensor | None,
    record1: Tensor | None,
    record2: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """From da [M, H]: (q, qt, scale) of dh = da * u * act'(h), the same of du = da * act(h), and their float32 [H] sums over rows.

    Without elements: what belongs to u where that has none, and the sums where they are not asked for.
    """
    gated = u.numel() > 0 or h.numel() == 0
    forward, backward = ACTIVATIONS[activation]
    dh = backward(grad * u if gated else grad, h)
    first = cast_of(dh, spec, rng, site1, "grad_output", scale1, record1, layout)
    nothing = grad.new_empty(0, dtype=torch.float32)
    if not gated:
        other = cast_of_fake(grad.new_empty(0, 1), spec, layout)
        return *first, *(t.new_empty(0) for t in other), dh.sum(0, dtype=torch.float32) if sums else nothing, torch.empty_like(nothing)
    du = grad * forward(h)
    second = cast_of(du, spec, rng, site2, "grad_output", scale2, record2, layout)
    return *first, *second, *((t.sum(0, dtype=torch.float32) if sums else torch.empty_like(nothing)) for t in (dh, du))


def act_backward_cast_fake(grad: Tensor, h: Tensor, u: Tensor, activation: str, *rest: Any) -> tuple[Tensor, ...]:
    spec, layout, sums = rest[3], rest[-2], rest[-1]
    made = cast_of_fake(grad, spec, layout)
    total, nothing = grad.new_empty(grad.shape[-1] if sums else 0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    if u.dim() == 1:
        return *made, *(t.new_empty(0) for t in made), total, nothing
    return *made, *cast_of_fake(grad, spec, layout), total, torch.empty_like(total)


act_backward_cast = define(
    "act_backward_cast(Tensor grad, Tensor h, Tensor u, str activation, Tensor? rng, str site1, str site2, str spec, Tensor? scale1,"
    " Tensor? scale2, Tensor? record1, Tensor? record2, str layout, bool sums)"
    " -> (Tensor q, Tensor qt, Tensor scale, Tensor q_u, Tensor qt_u, Tensor scale_u, Tensor sum, Tensor sum_u)",
    act_backward_cast_reference,
    act_backward_cast_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, w2, b1, b2, input, weight1, weight2, record1, record2, scales1, scales2, _, _, rng, ctx.activation, *texts = inputs
    ctx.site1, ctx.site2, ctx.input_spec, ctx.weight1_spec, ctx.weight2_spec, backward1, backward2, *_ = texts
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.specs = [SiteSpec.parse_backward(text) for text in (backward1, backward2)]
    ctx.dtypes = (x.dtype, w1.dtype, None if w2 is None else w2.dtype)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b1, b2)]
    first = Saved.of(x, w1, input, weight1, ctx.specs[0]).recasting(w1)
    scale2 = None if w2 is None else weight2[1]
    ctx.save_for_backward(*first.tensors(), w2, scale2, *output[4:], scales1, scales2, rng)
    keep(ctx, record1, record2)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 27
    *saved1, w2, weight2_scale, h, u, scales1, scales2, rng = ctx.saved_tensors
    needs = ctx.needs_input_grad
    states = [
        Backward(ctx.site1, ctx.specs[0], rng, scales1, record=ctx.records[0]),
        Backward(ctx.site2, ctx.specs[1], rng, scales2, record=ctx.records[1]),
    ]
    first = Saved.restore(tuple(saved1))
    flat, h = as_matrix(grad).contiguous(), as_matrix(h)
    u = u if w2 is None else as_matrix(u)
    spec = ctx.specs[0].grad_output
    layout = LAYOUTS[2 if needs[0] else 1]
    biases = any(dtype is not None for dtype in ctx.bias_dtypes)
    made = act_backward_cast(
        flat, h, u, ctx.activation, rng, ctx.site1, ctx.site2, spec.text, states[0].scale("grad_output"),
        None if w2 is None else states[1].scale("grad_output"), states[0].own_record("grad_output"),
        states[1].own_record("grad_output"), layout, biases,
    )  # fmt: skip
    formula = LinearBackward(states[0], first, ctx.input_spec, ctx.weight1_spec, (ctx.dtypes[0], ctx.dtypes[1]))
    dx, dw1 = formula.products(flat, *_operands(made[:3], spec, states[0]), needs[0], needs[1])
    dw2 = None
    if w2 is not None:
        other = Saved(first.input, [], first.x, w2, first.input_scale, weight2_scale)
        formula = LinearBackward(states[1], other, ctx.input_spec, ctx.weight2_spec, (ctx.dtypes[0], ctx.dtypes[2]))
        dx2, dw2 = formula.products(flat, *_operands(made[3:6], spec, states[1]), needs[0], needs[2])
        dx = None if dx is None or dx2 is None else dx + dx2
    dx = None if dx is None else dx.reshape(*grad.shape[:-1], dx.shape[-1])
    sums = [None if dtype is None else total.to(dtype) for dtype, total in zip(ctx.bias_dtypes, made[6:], strict=True)]
    return dx, dw1, dw2, *sums, *([None] * 22)


def _operands(made: Any, spec: TensorSpec, state: Backward) -> tuple[Operand, Operand]:
    q, qt, scale = made
    known = scale if spec.scaling == "current" else state.scale("grad_output")
    if known is None:
        return Operand(q, None, spec.format), Operand(qt, None, spec.format)
    return quantized_operand([q, known], spec), quantized_operand([qt, known], spec)


act_linear = define(
    "act_linear(Tensor x, Tensor w1, Tensor? w2, Tensor? b1, Tensor? b2, Tensor[] input, Tensor[] weight1, Tensor[] weight2,"
    " Tensor? record1, Tensor? record2, Tensor? scales1, Tensor? scales2, Tensor? scale, Tensor? record, Tensor? rng, str activation,"
    " str site1, str site2, str input_spec, str weight1_spec, str weight2_spec, str backward1, str backward2, str spec, str site,"
    " str layout, ScalarType dtype) -> (Tensor anchor, Tensor q, Tensor qt, Tensor scale_a, Tensor h, Tensor u)",
    act_linear_reference,
    act_linear_fake,
    setup_context=_setup,
    backward=_backward,
)
