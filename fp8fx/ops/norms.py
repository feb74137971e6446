"""norm_cast: a norm that writes FP8, with the residual added before it, as one operator. *lower* makes it for graphs that run eagerly.

    norm_cast(x, residual, weight, ...)   s = x + residual;  codes of norm(s)   -> anchor of the norm's output, s, q, qt, scale, mean, rstd
    residual None                         codes of norm(x)                      s has no elements
    norm_backward(grad, x, add, ...)      dx + add, dweight, dbias              add: the gradient that reaches s past the norm

kind: `layer` and `rms` are torch's own norms over the last dimension, `rms_rounded` is Llama's, whose normalized values are rounded to x's
dtype before the weight multiplies them. The numbers are those of the separate operators, bit for bit. The norm's output is never written:
what reads it takes its codes, and the anchor carries the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8fx.ops.act_gradients import cast_of, cast_of_fake
from fp8fx.ops.arguments import signature, takes
from fp8fx.ops.library import define
from fp8fx.ops.producers import make_anchor

KINDS = ("layer", "rms", "rms_rounded")


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """The norm as the model writes it."""
    if kind == "layer":
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "rms":
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) if weight is None else weight * h.to(x.dtype)


def _statistics(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """float32 mean, without elements for rms, and rstd, of each row."""
    h = x.float()
    if kind != "layer":
        return h.new_empty(0), torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    variance, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + eps)


class NormCast(NamedTuple):
    """The arguments of `norm_cast`: `x` [..., K] and `residual` of one shape and dtype; how the norm's output is cast, as role `input`
    of `site`. `scale`: float32 (), where it is delayed."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    kind: str
    eps: float
    spec: str
    rng: Tensor | None
    site: str
    scale: Tensor | None
    record: Tensor | None
    layout: str


@takes(NormCast)
def norm_cast_reference(a: NormCast) -> tuple[Tensor, ...]:
    s = a.x if a.residual is None else a.x + a.residual
    y = normalize(s, a.weight, a.bias, a.kind, a.eps)
    codes = cast_of(y, a.spec, a.rng, a.site, "input", a.scale, a.record, a.layout)
    of_sum = a.x.new_empty(0) if a.residual is None else s
    return make_anchor(y.shape, y.dtype, y.device), of_sum, *codes, *_statistics(s, a.kind, a.eps)


@takes(NormCast)
def norm_cast_fake(a: NormCast) -> tuple[Tensor, ...]:
    x = a.x
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    mean = torch.empty_like(rstd) if a.kind == "layer" else rstd.new_empty(0)
    s = x.new_empty(0) if a.residual is None else x.new_empty(x.shape)
    return make_anchor(x.shape, x.dtype, x.device), s, *cast_of_fake(x, a.spec, a.layout), mean, rstd


class NormBackward(NamedTuple):
    """The arguments of `norm_backward`. `mean` and `rstd` are those of the forward."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    add: Tensor | None
    kind: str
    eps: float


@takes(NormBackward)
def norm_backward_reference(a: NormBackward) -> tuple[Tensor, Tensor, Tensor]:
    """(dx + add, dweight, dbias), those that are not there without elements."""
    x, nothing = a.x, a.x.new_empty(0)
    if a.kind == "layer":
        wanted = [True, a.weight is not None, a.bias is not None]
        own = torch.native_layer_norm(x, x.shape[-1:], a.weight, a.bias, a.eps)[1:]  # torch's may be in x's dtype
        found = torch.ops.aten.native_layer_norm_backward(a.grad, x, x.shape[-1:], *own, a.weight, a.bias, wanted)
        dx, dw, db = (part if want else nothing for part, want in zip(found, wanted, strict=True))
    else:
        dx, dw = _rms_backward(a.grad, x, a.weight, a.rstd, a.kind)
        db = nothing
    return dx if a.add is None else dx + a.add, nothing if dw is None else dw, db


def _rms_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), step by step as autograd takes them: in float32, with the roundings of `normalize`."""
    h = x.float()
    rounds = (lambda t: t.to(x.dtype)) if kind == "rms_rounded" else (lambda t: t)
    n, g = rounds(h * rstd), rounds(grad.float())
    dw = None if weight is None else (g * n).sum(tuple(range(x.dim() - 1))).to(weight.dtype)
    dn = (g if weight is None else g * weight).float()
    of_mean = -0.5 * (dn * h).sum(-1, keepdim=True) * rstd.pow(3) / x.shape[-1]
    return (dn * rstd + of_mean.expand_as(h) * (2 * h)).to(x.dtype), dw


@takes(NormBackward)
def norm_backward_fake(a: NormBackward) -> tuple[Tensor, Tensor, Tensor]:
    of_weight, of_bias = (a.x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (a.weight, a.bias))
    return a.x.new_empty(a.x.shape), of_weight, of_bias


norm_backward = define(
    f"norm_backward({signature(NormBackward)}) -> (Tensor dx, Tensor dw, Tensor db)", norm_backward_reference, norm_backward_fake
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = NormCast(*inputs)
    ctx.kind, ctx.eps, ctx.adds = a.kind, a.eps, a.residual is not None
    ctx.mark_non_differentiable(*output[2:], *([] if ctx.adds else [output[1]]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.adds else a.x, a.weight, a.bias, *output[5:])


def _backward(ctx: Any, grad: Tensor | None, of_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """One gradient for x and residual: that of their sum."""
    nothing = [None] * 8
    if grad is None:
        return of_sum, of_sum if ctx.adds else None, None, None, *nothing
    x, weight, bias, mean, rstd = ctx.saved_tensors
    add = None if of_sum is None else of_sum.contiguous()
    dx, dw, db = norm_backward(grad.contiguous(), x, weight, bias, mean, rstd, add, ctx.kind, ctx.eps)
    of_weight, of_bias = (None if t is None else d for t, d in ((weight, dw), (bias, db)))
    return dx, dx if ctx.adds else None, of_weight, of_bias, *nothing


norm_cast = define(
    f"norm_cast({signature(NormCast)}) -> (Tensor anchor, Tensor s, Tensor q, Tensor qt, Tensor scale_y, Tensor mean, Tensor rstd)",
    norm_cast_reference,
    norm_cast_fake,
    setup_context=_setup,
    backward=_backward,
)
