"""The operators of activations on CUDA devices: those of `act`, which are not fused, here; act_linear and its gradients beside this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx.kernels import cast as kernel
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.replay import taped
from fp8fx.ops import act as act_op
from fp8fx.ops.act import KEPT
from fp8fx.ops.cuda_act_gradients import act_backward_cast, act_backward_gate, act_backward_up
from fp8fx.ops.cuda_act_linear import act_linear
from fp8fx.ops.cuda_casts import DTYPES
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.quantize import as_matrix


def act(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """Not fused: torch's own activation, and a cast of h and u."""
    y = ACTIVATIONS[activation][0](h)
    return y if u is None else y * u, *_keep(h, h), *_keep(u, h)


def _keep(x: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if x is None or x.dtype not in DTYPES:
        return act_op.keep(x, like)
    made = cast_block(as_matrix(x), KEPT.format, (1, act_op.SIDE), None, "rows", kernel.NEAREST, KEPT.power_of_two, KEPT.eps)
    assert made.q is not None
    assert made.scale is not None
    return made.q.view(torch.uint8), made.scale


def act_backward(
    grad: Tensor, q_h: Tensor, scale_h: Tensor, q_u: Tensor | None, scale_u: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    forward, backward = ACTIVATIONS[activation]
    h = _restore(q_h, scale_h, grad)
    if q_u is None or scale_u is None:
        return backward(grad, h), grad.new_empty(0)
    du = grad * forward(h)
    return backward(grad * _restore(q_u, scale_u, grad), h), du


def _restore(q: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """In like's dtype throughout: bfloat16 holds codes, powers of two and their products. The reference where that is not so."""
    m, k = q.shape
    if like.dtype == torch.float16 or k % act_op.SIDE:
        return act_op.restore(q, scale, like.dtype).view(like.shape)
    values = q.view(torch.float8_e4m3fn).to(like.dtype).view(m, k // act_op.SIDE, act_op.SIDE)
    return values.mul_(scale.to(like.dtype).unsqueeze(-1)).view(like.shape)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "act": act,
    "act_backward": act_backward,
    "act_linear": act_linear,
    "act_backward_cast": taped(act_backward_cast),
    "act_backward_gate": taped(act_backward_gate),
    "act_backward_up": taped(act_backward_up),
}
