"""Fused producers: what computes a tensor also quantizes it, so that the high-precision tensor is never written.

    layer_norm_quantize(x, weight, bias, ...)  = quantize(layer_norm(x))  -> anchor, q, scale, amax, mean, rstd
    linear_quantize(x, w, b, ...)              = quantize(linear(x))      -> anchor, q, scale, amax

A fused producer has no high-precision output left, but the gradient must still reach it. So it returns an *anchor*: a zero
expanded with stride 0 to the right shape, which costs no memory, is read by nobody, and carries the gradient back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.ops.library import define
from fp8fx.ops.linear import linear_backward, linear_fake, linear_reference, linear_setup
from fp8fx.ops.quantize import quantize_fake, quantize_reference


def make_anchor(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero of `shape` with stride 0 everywhere."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def layer_norm_quantize_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    spec: str,
    dims: list[int],
    rng: Tensor | None,
    site: str,
    role: str,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    return make_anchor(y.shape, y.dtype, x.device), *quantize_reference(y, spec, dims, rng, site, role, scale), mean, rstd


def layer_norm_quantize_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: list[int], eps: float, spec: str, dims: list[int], *rest: Any
) -> tuple[Tensor, ...]:
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    return make_anchor(y.shape, y.dtype, x.device), *quantize_fake(y, spec, dims), mean, rstd


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.shape, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, output[4], output[5])


def _norm_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.aten.native_layer_norm_backward(grad.contiguous(), x, ctx.shape, mean, rstd, weight, bias, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *([None] * 8)


layer_norm_quantize = define(
    "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, SymInt[] normalized_shape, float eps, str spec, int[] dims,"
    " Tensor? rng, str site, str role, Tensor? scale) -> (Tensor anchor, Tensor q, Tensor used_scale, Tensor amax, Tensor mean,"
    " Tensor rstd)",
    layer_norm_quantize_reference,
    layer_norm_quantize_fake,
    setup_context=_norm_setup,
    backward=_norm_backward,
)


def linear_quantize_reference(*args: Any) -> tuple[Tensor, ...]:
    """The arguments of `linear`, then spec, scale and dtype of the output: Q(X W^T + b), rounded once from the fp32 accumulator."""
    *linear_args, spec, scale, _ = args
    accumulator: Any = (*linear_args, torch.float32)
    y = linear_reference(*accumulator)
    rng, site = linear_args[7:9]
    return make_anchor(y.shape, torch.float32, y.device), *quantize_reference(y, spec, [-1], rng, site, "output", scale)


def linear_quantize_fake(*args: Any) -> tuple[Tensor, ...]:
    linear_args, spec = args[:-3], args[-3]
    y = linear_fake(*linear_args, torch.float32)
    return make_anchor(y.shape, torch.float32, y.device), *quantize_fake(y, spec, [-1])


def _linear_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    linear_setup(ctx, (*inputs[:-3], inputs[-1]), output[0])


def _linear_quantize_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (None,) * 15 if grad is None else (*linear_backward(ctx, grad)[:-1], None, None, None)


linear_quantize = define(
    "linear_quantize(Tensor x, Tensor w, Tensor? b, Tensor[] input, Tensor[] weight, Tensor? meter, Tensor? scales,"
    " Tensor? rng, str site, str input_spec, str weight_spec, str backward, str output_spec, Tensor? scale, ScalarType dtype)"
    " -> (Tensor anchor, Tensor q, Tensor used_scale, Tensor amax)",
    linear_quantize_reference,
    linear_quantize_fake,
    setup_context=_linear_quantize_setup,
    backward=_linear_quantize_backward,
)
