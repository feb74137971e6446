"""matmul and linear under an arithmetic, with gradients.

The gradient is straight through: dA = dY B^T and dB = A^T dY, of the operands as the product read them (rounded to `operands`, if asked).
With `gradients: exact` both are ordinary float32 products; with `same` they use the arithmetic of the forward product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fp8fx.arithmetic import operands as op
from fp8fx.arithmetic.product import product
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.errors import ModelError

Given = Arithmetic | str | Mapping[str, Any]


def matmul(a: Tensor, b: Tensor, arithmetic: Given, *, compiled: bool = False) -> Tensor:
    """`a` [..., M, K] @ `b` [..., K, N] -> [..., M, N] in the wider dtype of the two; computed in float32. Differentiable once.

    arithmetic: an `Arithmetic`, its text, or a mapping of its keys. compiled: on a CPU, tiles through Inductor; the same bits, after
    some seconds of compilation per arithmetic.
    Raises ModelError for operands that are no float matrices or do not fit, FormatError and ModelError for a wrong arithmetic.
    """
    text = _text(arithmetic)
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ModelError(f"arithmetic.matmul: {name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() < 2:
            raise ModelError(f"arithmetic.matmul: {name} must have 2 or more dimensions, got shape {list(x.shape)}; add one (x[None])")
    if a.shape[-1] != b.shape[-2]:
        raise ModelError(f"arithmetic.matmul: {list(a.shape)} by {list(b.shape)}: the last of a and the last but one of b must be equal")
    if a.device != b.device:
        raise ModelError(f"arithmetic.matmul: a is on {a.device} and b on {b.device}; move one of them")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return _arithmetic_mm(a.to(dtype), b.to(dtype), text, compiled)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, arithmetic: Given = "exact", *, compiled: bool = False) -> Tensor:
    """`x` [..., K] times `w` [N, K] transposed, plus `bias` [N] in the result's dtype: [..., N]. Else as `matmul`."""
    if x.dim() < 1 or w.dim() != 2:
        raise ModelError(f"arithmetic.linear: x must be [..., K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}")
    y = matmul(x.reshape(-1, x.shape[-1]), w.mT, arithmetic, compiled=compiled).reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


@torch.compiler.assume_constant_result
def _text(arithmetic: Given) -> str:
    """The arithmetic's text, a constant for Dynamo."""
    return Arithmetic.of(arithmetic).text


@torch.library.custom_op("fp8fx::arithmetic_mm", mutates_args=())
def _arithmetic_mm(a: Tensor, b: Tensor, arithmetic: str, compiled: bool) -> Tensor:
    return product(a.float(), b.float(), Arithmetic.parse(arithmetic), compiled=compiled).to(a.dtype)


@_arithmetic_mm.register_fake
def _(a: Tensor, b: Tensor, arithmetic: str, compiled: bool) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, text, ctx.compiled = inputs
    ctx.text = text
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    arithmetic = Arithmetic.parse(ctx.text)
    text = ctx.text if arithmetic.gradients == "same" else "exact"
    a_read, b_read = (op.rounded(x, arithmetic.operands) for x in (a, b))
    da = db = None
    if ctx.needs_input_grad[0]:
        da = _arithmetic_mm(grad.float(), b_read.mT, text, ctx.compiled).sum_to_size(a.shape).to(a.dtype)
    if ctx.needs_input_grad[1]:
        db = _arithmetic_mm(a_read.mT, grad.float(), text, ctx.compiled).sum_to_size(b.shape).to(b.dtype)
    return da, db, None, None


_arithmetic_mm.register_autograd(_backward, setup_context=_setup)
