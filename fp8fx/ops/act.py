"""act: an activation that keeps what its derivative reads in FP8 (`save_activation_inputs: fp8`), gated or not.

    act(h, u, activation)    y = act(h) * u, or act(h) where u is None       -> y, and the codes and scales of h and u

y is that of the high-precision h and u. Backward sees what was kept of them, h~ and u~:

    h~ = float32(codes) * scale, cast to h's dtype     codes e4m3fn, nearest-even, saturating
    scale = 1 / 2^floor(log2(448 / max(amax, 1e-12)))  one for each row of 128 columns, amax over its finite elements
    dh = dy * u~ * act'(h~)        du = dy * act(h~)

A scale for 128 elements needs no measuring pass and no state, which one for the tensor would; it is a power of two, so that h~ is exact in
any dtype of at least 4 bits. No GEMM reads these codes. *insert_qdq* writes the operator; where a graph runs on kernels, `act_linear` takes
it in (ops/act_linear.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops.library import define
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import TensorSpec

SIDE = 128
KEPT = TensorSpec(format="e4m3fn", granularity=(1, SIDE), power_of_two=True)


def keep(x: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [M, K] as uint8, scales float32 [M, ceil(K / 128)]) of x [..., K]; without elements where x is None."""
    if x is None:
        return like.new_empty(0, dtype=torch.uint8), like.new_empty(0, dtype=torch.float32)
    q, scale, _ = numerics.quantize_tensor(as_matrix(x), KEPT, (-1,))
    return q.contiguous().view(torch.uint8), scale


def keep_fake(x: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if x is None:
        return like.new_empty(0, dtype=torch.uint8), like.new_empty(0, dtype=torch.float32)
    matrix = as_matrix(x)
    scale = x.new_empty((matrix.shape[0], (matrix.shape[1] + SIDE - 1) // SIDE), dtype=torch.float32)
    return x.new_empty(matrix.shape, dtype=torch.uint8), scale


def restore(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """h~ [M, K]."""
    return numerics.dequantize_tensor(q.view(torch.float8_e4m3fn), scale, KEPT.format, KEPT.granularity, dtype)


def act_reference(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """h, u [..., K] -> y [..., K]; codes and scales of h and u, as matrices."""
    y = ACTIVATIONS[activation][0](h)
    return y if u is None else y * u, *keep(h, h), *keep(u, h)


def act_fake(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    return h.new_empty(h.shape), *keep_fake(h, h), *keep_fake(u, h)


def act_backward_reference(
    grad: Tensor, q_h: Tensor, scale_h: Tensor, q_u: Tensor | None, scale_u: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(dh, du) of dy [..., K], of its shape and dtype; du without elements where there is no u."""
    forward, backward = ACTIVATIONS[activation]
    h = restore(q_h, scale_h, grad.dtype).view(grad.shape)
    if q_u is None or scale_u is None:
        return backward(grad, h), grad.new_empty(0)
    return backward(grad * restore(q_u, scale_u, grad.dtype).view(grad.shape), h), grad * forward(h)


def act_backward_fake(grad: Tensor, q_h: Tensor, scale_h: Tensor, q_u: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), grad.new_empty(0 if q_u is None else grad.shape)


act_backward = define(
    "act_backward(Tensor grad, Tensor q_h, Tensor scale_h, Tensor? q_u, Tensor? scale_u, str activation) -> (Tensor dh, Tensor du)",
    act_backward_reference,
    act_backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, u, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:3], *(output[3:] if u is not None else (None, None)))


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    dh, du = act_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation)
    return dh, du if ctx.saved_tensors[2] is not None else None, None


act = define(
    "act(Tensor h, Tensor? u, str activation) -> (Tensor y, Tensor q_h, Tensor scale_h, Tensor q_u, Tensor scale_u)",
    act_reference,
    act_fake,
    setup_context=_setup,
    backward=_backward,
)
