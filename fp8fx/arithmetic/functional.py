"""matmul and linear under an arithmetic, with gradients.

The gradient is straight through: dA = dY B^T and dB = A^T dY, of the operands as the product read them (rounded to `operands`, if asked).
With `gradients: exact` both are ordinary float32 products; with `same` they use the arithmetic of the forward product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.arithmetic import operands as op
from fp8fx.arithmetic.product import product
from fp8fx.arithmetic.spec import Arithmetic, Given
from fp8fx.arithmetic.stream import Stream
from fp8fx.errors import ModelError


def matmul(a: Tensor, b: Tensor, arithmetic: Given, *, compiled: bool = False, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    """`a` [..., M, K] @ `b` [..., K, N] -> [..., M, N]; computed in float32, then cast to `dtype` once. Differentiable once.

    arithmetic: an `Arithmetic`, its text, or a mapping of its keys. compiled: on a CPU, tiles through Inductor; the same bits, after
    some seconds of compilation per arithmetic. dtype: of the result; by default the wider one of the two operands, and float32 where
    either is a float8 one. float16 ends at 65504 whatever `accumulate` is: dtype=torch.float32 keeps what lies beyond.
    seed: 64 bits, where rounding is stochastic: the same seed gives the same bits, on every device, and those of each gradient are others.
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
    narrow = a.dtype.itemsize == 1 or b.dtype.itemsize == 1
    usual = torch.float32 if narrow else torch.promote_types(a.dtype, b.dtype)
    wanted = usual if dtype is None else _checked(dtype)
    work = usual if wanted == usual else torch.float32  # the product returns its operands' dtype
    return _arithmetic_mm(a.to(work), b.to(work), text, compiled, _signed(seed), "output").to(wanted)


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    arithmetic: Given = "exact",
    *,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Tensor:
    """`x` [..., K] times `w` [N, K] transposed, plus `bias` [N], which is cast to the result's dtype: [..., N]. Else as `matmul`."""
    for name, operand in (("x", x), ("w", w), *(() if bias is None else (("bias", bias),))):
        if not isinstance(operand, Tensor) or not operand.is_floating_point():
            got = getattr(operand, "dtype", type(operand).__name__)
            raise ModelError(f"arithmetic.linear: {name} must be a floating point tensor, got {got}")
    if x.dim() < 1 or w.dim() != 2:
        raise ModelError(f"arithmetic.linear: x must be [..., K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}")
    if x.shape[-1] != w.shape[1]:
        raise ModelError(f"arithmetic.linear: x {list(x.shape)} and w {list(w.shape)}: their last dimensions, K, must be equal")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ModelError(
            f"arithmetic.linear: bias must be [{w.shape[0]}], one element per row of w {list(w.shape)}; got {list(bias.shape)}"
        )
    y = matmul(x.reshape(-1, x.shape[-1]), w.mT, arithmetic, compiled=compiled, dtype=dtype, seed=seed)
    y = y.reshape(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


def _checked(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise ModelError(f"dtype: got {dtype!r}; allowed: torch.float32, torch.bfloat16, torch.float16 or torch.float64")
    return dtype


def _signed(seed: object) -> int:
    """The seed's 64 bits as an int64, which is what an operator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ModelError(f"seed: got {seed!r}; allowed: a whole number of up to 64 bits")
    return seed - 2**64 if seed >= 2**63 else seed


@torch.compiler.assume_constant_result
def _text(arithmetic: Given) -> str:
    """The arithmetic's text, a constant for Dynamo."""
    return Arithmetic.of(arithmetic).text


@torch.library.custom_op("fp8fx::arithmetic_mm", mutates_args=())
def _arithmetic_mm(a: Tensor, b: Tensor, arithmetic: str, compiled: bool, seed: int, role: str) -> Tensor:
    stream = Stream.of(seed, "arithmetic.matmul", role)
    return product(a.float(), b.float(), Arithmetic.parse(arithmetic), compiled=compiled, stream=stream).to(a.dtype)


@_arithmetic_mm.register_fake
def _(a: Tensor, b: Tensor, arithmetic: str, compiled: bool, seed: int, role: str) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, text, ctx.compiled, ctx.seed, _ = inputs
    ctx.text = text
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    arithmetic = Arithmetic.parse(ctx.text)
    text = ctx.text if arithmetic.gradients == "same" else "exact"
    a_read, b_read = (op.rounded(x, arithmetic.operands) for x in (a, b))
    da = db = None
    if ctx.needs_input_grad[0]:
        da = _arithmetic_mm(grad.float(), b_read.mT, text, ctx.compiled, ctx.seed, "grad_a").sum_to_size(a.shape).to(a.dtype)
    if ctx.needs_input_grad[1]:
        db = _arithmetic_mm(a_read.mT, grad.float(), text, ctx.compiled, ctx.seed, "grad_b").sum_to_size(b.shape).to(b.dtype)
    return da, db, None, None, None, None


_arithmetic_mm.register_autograd(_backward, setup_context=_setup)
