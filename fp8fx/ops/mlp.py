"""mlp: linear -> activation -> linear as one operator with one autograd formula.

    mlp(x, w1, b1, w2, b2, ...) = linear(act(linear(x, w1, b1)), w2, b2)      -> y, h, q, scale, amax

Its backward hands the gradient of the hidden tensor from one GEMM to the next: dY -> Q -> dA -> dH = act'(h) dA -> Q -> dX,
so that a kernel can write Q(dH) directly. Saved are codes, scales and `h`, which the activation's own derivative reads.
The numbers are those of the three separate operators, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8fx.ops.library import define
from fp8fx.ops.linear import LinearBackward, Saved, bias_gradient, linear_reference
from fp8fx.ops.operands import Backward
from fp8fx.ops.quantize import quantize_fake, quantize_reference
from fp8fx.spec import SiteSpec

aten = torch.ops.aten

# name -> (forward, backward(grad, h)); the backward calls the same kernel autograd would.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, lambda grad, h: aten.gelu_backward(grad, h, approximate="none")),
    "gelu_tanh": (lambda h: F.gelu(h, approximate="tanh"), lambda grad, h: aten.gelu_backward(grad, h, approximate="tanh")),
    "relu": (F.relu, lambda grad, h: aten.threshold_backward(grad, h, 0)),
    "silu": (F.silu, aten.silu_backward),
}


def mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    input: list[Tensor],
    weight1: list[Tensor],
    weight2: list[Tensor],
    meter1: Tensor | None,
    meter2: Tensor | None,
    scales1: Tensor | None,
    scales2: Tensor | None,
    scale: Tensor | None,
    rng: Tensor | None,
    activation: str,
    site1: str,
    input1_spec: str,
    weight1_spec: str,
    backward1: str,
    dtype1: torch.dtype,
    site2: str,
    input2_spec: str,
    weight2_spec: str,
    backward2: str,
    dtype2: torch.dtype,
) -> tuple[Tensor, ...]:
    """`x` [..., K], `w1` [H, K], `w2` [N, H] -> y [..., N] in `dtype2`, h [..., H] in `dtype1`; codes, scale and amax of act(h).

    scale: that of act(h), float32 (), where its scaling is delayed.
    """
    h = linear_reference(x, w1, b1, input, weight1, None, None, rng, site1, input1_spec, weight1_spec, backward1, dtype1)
    a = ACTIVATIONS[activation][0](h)
    q, used, amax = quantize_reference(a, input2_spec, [-1], rng, site2, "input", scale)
    y = linear_reference(a, w2, b2, [q, used], weight2, None, None, rng, site2, input2_spec, weight2_spec, backward2, dtype2)
    return y, h, q, used, amax


def mlp_fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype1, _, input2_spec, _, _, dtype2 = rest[-6:]
    h = x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=dtype1)
    return x.new_empty((*x.shape[:-1], w2.shape[0]), dtype=dtype2), h, *quantize_fake(h, input2_spec, [-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, b2, input, weight1, weight2, _, _, scales1, scales2, _, rng, ctx.activation, *texts = inputs
    site1, input1_spec, weight1_spec, backward1, dtype1, site2, input2_spec, weight2_spec, backward2, _ = texts
    ctx.sites, ctx.specs = (site1, site2), ((input1_spec, weight1_spec), (input2_spec, weight2_spec))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.site_specs = [SiteSpec.parse_backward(text) for text in (backward1, backward2)]
    ctx.dtypes = ((x.dtype, w1.dtype), (dtype1, w2.dtype))
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b1, b2)]
    _, h, q, scale, _ = output
    first = Saved.of(x, w1, input, weight1, ctx.site_specs[0])
    second = Saved.of(h, w2, [q, scale], weight2, ctx.site_specs[1])
    ctx.save_for_backward(*first.tensors(), *second.tensors(), h, scales1, scales2, rng)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 25
    *saved, h, scales1, scales2, rng = ctx.saved_tensors
    needs = ctx.needs_input_grad
    formulas = [
        LinearBackward(
            Backward(ctx.sites[i], ctx.site_specs[i], rng, (scales1, scales2)[i]),
            Saved.restore(tuple(saved[8 * i : 8 * i + 8])),
            ctx.specs[i][0],
            ctx.specs[i][1],
            ctx.dtypes[i],
        )
        for i in (0, 1)
    ]
    db2 = bias_gradient(grad, ctx.bias_dtypes[1]) if ctx.bias_dtypes[1] is not None and needs[4] else None
    first_needs = needs[0] or needs[1] or needs[2] or needs[8]
    da, dw2, row2 = formulas[1](grad, first_needs, needs[3], needs[9])
    if da is None:
        return None, None, None, dw2, db2, None, None, None, None, row2, *([None] * 15)
    dh = ACTIVATIONS[ctx.activation][1](da, h)
    db1 = bias_gradient(dh, ctx.bias_dtypes[0]) if ctx.bias_dtypes[0] is not None and needs[2] else None
    dx, dw1, row1 = formulas[0](dh, needs[0], needs[1], needs[8])
    return dx, dw1, db1, dw2, db2, None, None, None, row1, row2, *([None] * 15)


mlp = define(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor[] input, Tensor[] weight1, Tensor[] weight2, Tensor? meter1,"
    " Tensor? meter2, Tensor? scales1, Tensor? scales2, Tensor? scale, Tensor? rng, str activation, str site1, str input1_spec,"
    " str weight1_spec, str backward1, ScalarType dtype1, str site2, str input2_spec, str weight2_spec, str backward2,"
    " ScalarType dtype2)"
    " -> (Tensor y, Tensor h, Tensor q, Tensor used_scale, Tensor amax)",
    mlp_reference,
    mlp_fake,
    setup_context=_setup,
    backward=_backward,
)
