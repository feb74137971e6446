"""act_linear: linear -> activation -> cast as one operator with one autograd formula. *lower* makes it where a graph runs on kernels.

    act_linear(x, w1, w2, ...)      a = act(x w1^T + b1) * (x w2^T + b2)      -> anchor of a, q, qt, scale, h, u
    w2 None                         a = act(x w1^T + b1)                      u has no elements

`a` is what the next layer multiplies, and it is never written in high precision: its codes are. Saved for backward are the codes of X, and
h and u, which the activation's derivative reads; or, with `save_activation_inputs: fp8`, their codes as `act` keeps them (ops/act.py).
Backward hands the gradient on in FP8:

    da -> act_backward_cast(da, h, u) -> codes of dh and du, in both layouts, and the bias gradients -> dX, dW1, dW2

Large tensors take two steps, act_backward_gate and then act_backward_up: da, h, u and the codes of dh and du at once are where a training
step needs most memory, and u is free before du's codes are made. That reads da and h once more, which is why small tensors do not.

Sites, specs, records and lists are those of `linear` with `columns` (ops/linear.py), once for w1 and once for w2. SwiGLU and GeGLU are the
gated forms; the numbers are those of the separate operators, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8fx.ops.act import keep, keep_fake
from fp8fx.ops.act_gradients import ActBackwardCast, act_backward_cast, act_backward_gate, act_backward_up, cast_of, cast_of_fake
from fp8fx.ops.arguments import signature, takes
from fp8fx.ops.casts import LAYOUTS
from fp8fx.ops.kept import keep as keep_records
from fp8fx.ops.library import define
from fp8fx.ops.linear import LinearBackward, Saved, linear_reference
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.operands import Backward, Operand, quantized_operand
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import SiteSpec, TensorSpec

APART = 2**27  # elements of da from which on dh and du are made one after the other; half as many where h and u are kept in FP8


class ActLinear(NamedTuple):
    """The arguments of `act_linear`: `x` [..., K], `w1` and `w2` [H, K]; how a is cast. `scale`: float32 (), where that is delayed."""

    x: Tensor
    w1: Tensor
    w2: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    input: list[Tensor]
    weight1: list[Tensor]
    weight2: list[Tensor]
    record1: Tensor | None
    record2: Tensor | None
    scales1: Tensor | None
    scales2: Tensor | None
    scale: Tensor | None
    record: Tensor | None
    rng: Tensor | None
    activation: str
    site1: str
    site2: str
    input_spec: str
    weight1_spec: str
    weight2_spec: str
    backward1: str
    backward2: str
    spec: str
    site: str
    layout: str
    dtype: torch.dtype

    def of_h(self, x: Tensor, codes: list[Tensor]) -> tuple[Any, ...]:
        """The arguments of `linear` for h; of `x` and its codes, which may be some of the rows."""
        specs = self.input_spec, self.weight1_spec, self.backward1
        return x, self.w1, self.b1, codes, self.weight1, None, None, self.rng, self.site1, *specs, self.dtype

    def of_u(self, x: Tensor, codes: list[Tensor]) -> tuple[Any, ...]:
        """The same for u."""
        specs = self.input_spec, self.weight2_spec, self.backward2
        return x, self.w2, self.b2, codes, self.weight2, None, None, self.rng, self.site2, *specs, self.dtype

    @property
    def gated(self) -> bool:
        return self.w2 is not None

    @property
    def kept_in_fp8(self) -> bool:
        return SiteSpec.parse_backward(self.backward1).save_activation_inputs == "fp8"


@takes(ActLinear)
def act_linear_reference(a: ActLinear) -> tuple[Tensor, ...]:
    """Anchor of a [..., H] of `dtype`; codes of a and its scale; h and u.

    Kept in FP8, h and u are codes [M, H], and two further results their scales; else those have no elements.
    """
    h = linear_reference(*a.of_h(a.x, a.input))
    u = h.new_empty(0)
    y = ACTIVATIONS[a.activation][0](h)
    if a.gated:
        u = linear_reference(*a.of_u(a.x, a.input))
        y = y * u
    codes = cast_of(y, a.spec, a.rng, a.site, "input", a.scale, a.record, a.layout)
    made = make_anchor(y.shape, y.dtype, y.device), *codes
    if not a.kept_in_fp8:
        return *made, h, u, *(h.new_empty(0, dtype=torch.float32) for _ in range(2))
    (q_h, block_h), (q_u, block_u) = keep(h, h), keep(u if a.gated else None, h)
    return *made, q_h, q_u, block_h, block_u


@takes(ActLinear)
def act_linear_fake(a: ActLinear) -> tuple[Tensor, ...]:
    h = a.x.new_empty((*a.x.shape[:-1], a.w1.shape[0]), dtype=a.dtype)
    u = torch.empty_like(h) if a.gated else h.new_empty(0)
    made = make_anchor(h.shape, a.dtype, a.x.device), *cast_of_fake(h, a.spec, a.layout)
    if not a.kept_in_fp8:
        return *made, h, u, *(h.new_empty(0, dtype=torch.float32) for _ in range(2))
    (q_h, block_h), (q_u, block_u) = keep_fake(h, h), keep_fake(u if a.gated else None, h)
    return *made, q_h, q_u, block_h, block_u


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = ActLinear(*inputs)
    ctx.activation, ctx.site1, ctx.site2 = a.activation, a.site1, a.site2
    ctx.input_spec, ctx.weight1_spec, ctx.weight2_spec = a.input_spec, a.weight1_spec, a.weight2_spec
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.specs = [SiteSpec.parse_backward(text) for text in (a.backward1, a.backward2)]
    ctx.dtypes = (a.x.dtype, a.w1.dtype, None if a.w2 is None else a.w2.dtype)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (a.b1, a.b2)]
    first = Saved.of(a.x, a.w1, a.input, a.weight1, ctx.specs[0])
    first = first.recasting(a.w1) if len(a.weight1) == 2 else first
    second: list[Tensor | None] = [None, None, None]  # codes of w2 with their scale, or w2 itself with the scale to cast it by
    if a.w2 is not None:
        second = [None, a.weight2[1], a.w2] if len(a.weight2) == 2 else [*a.weight2[2:], None]
    ctx.save_for_backward(*first.tensors(), *second, *output[4:], a.scales1, a.scales2, a.rng)
    keep_records(ctx, a.record1, a.record2)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ActLinear._fields)
    *saved1, weight2, weight2_scale, w2, h, u, block_h, block_u, scales1, scales2, rng = ctx.saved_tensors
    needs = ctx.needs_input_grad
    states = [
        Backward(ctx.site1, ctx.specs[0], rng, scales1, record=ctx.records[0]),
        Backward(ctx.site2, ctx.specs[1], rng, scales2, record=ctx.records[1]),
    ]
    first = Saved.restore(tuple(saved1))
    spec = ctx.specs[0].grad_output
    kept = ctx.specs[0].save_activation_inputs == "fp8"
    flat, h = as_matrix(grad).contiguous(), as_matrix(h)
    gated = ctx.dtypes[2] is not None
    inputs = (h, as_matrix(u) if gated else u, block_h if kept else None, block_u if kept and gated else None)
    layout = LAYOUTS[2 if needs[0] else 1]
    biases = any(dtype is not None for dtype in ctx.bias_dtypes)
    made = _gradients(flat, inputs, ctx.activation, states, gated, layout, biases)
    formula = LinearBackward(states[0], first, ctx.input_spec, ctx.weight1_spec, (ctx.dtypes[0], ctx.dtypes[1]))
    dx, dw1 = formula.products(flat, *_operands(made[:3], spec, states[0]), needs[0], needs[1])
    dw2 = None
    if gated:
        codes = [] if weight2 is None else [weight2, weight2_scale]
        other = Saved(first.input, codes, first.x, w2, first.input_scale, weight2_scale)
        formula = LinearBackward(states[1], other, ctx.input_spec, ctx.weight2_spec, (ctx.dtypes[0], ctx.dtypes[2]))
        dx2, dw2 = formula.products(flat, *_operands(made[3:6], spec, states[1]), needs[0], needs[2])
        dx = None if dx is None or dx2 is None else dx + dx2
    dx = None if dx is None else dx.reshape(*grad.shape[:-1], dx.shape[-1])
    sums = [None if dtype is None else total.to(dtype) for dtype, total in zip(ctx.bias_dtypes, made[6:], strict=True)]
    return dx, dw1, dw2, *sums, *([None] * (len(ActLinear._fields) - 5))


def _gradients(
    flat: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    activation: str,
    states: list[Backward],
    gated: bool,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """What act_backward_cast returns, by one step or two. inputs: h, u, and their scales where they are codes."""
    spec = states[0].spec.grad_output
    assert spec is not None
    h, u, block_h, block_u = inputs
    first, second = states
    scales = first.scale("grad_output"), second.scale("grad_output") if gated else None
    records = first.own_record("grad_output"), second.own_record("grad_output")
    how = first.rng, first.site, second.site, spec.text, *scales, *records, layout, sums
    a = ActBackwardCast(flat, h, u, block_h, block_u, activation, *how)
    size = flat.numel()
    if not gated or not isinstance(size, int) or size < (APART if block_h is None else APART // 2):
        return act_backward_cast(*a)  # type: ignore[no-any-return]
    *dh, total, amax = act_backward_gate(*a.gate())
    *du, total_u = act_backward_up(*a.up(amax if spec.scaling == "current" else None))
    return *dh, *du, total, total_u


def _operands(made: Any, spec: TensorSpec, state: Backward) -> tuple[Operand, Operand]:
    q, qt, scale = made
    known = scale if spec.scaling == "current" else state.scale("grad_output")
    if known is None:
        return Operand(q, None, spec.format), Operand(qt, None, spec.format)
    return quantized_operand([q, known], spec), quantized_operand([qt, known], spec)


act_linear = define(
    f"act_linear({signature(ActLinear)})"
    " -> (Tensor anchor, Tensor q, Tensor qt, Tensor scale_a, Tensor h, Tensor u, Tensor block_h, Tensor block_u)",
    act_linear_reference,
    act_linear_fake,
    setup_context=_setup,
    backward=_backward,
)
