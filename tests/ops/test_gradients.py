"""Gradients of every operator against float64 autograd of the dequantized operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.samples import (
    DELAYED,
    INDEX,
    KEPT,
    PLAIN,
    SPEC,
    codes,
    conv_args,
    embedding_args,
    grouped_args,
    learned,
    linear_args,
    matmul_args,
    mlp_args,
    norm_args,
    ops,
    quantized,
    scales,
    values,
)
from passes.trace import randn
from torch import Tensor
from torch.nn import functional as F

from fp8fx.ops.quantize import STATISTICS
from fp8fx.spec import TensorSpec


def gradients(name: str, args: tuple[Any, ...], output: Tensor) -> list[Tensor]:
    """Of the leaves among `args`, for a fixed gradient of `output`."""
    output.backward(randn(*output.shape, seed=9).to(output.dtype))
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad and a.numel() != STATISTICS]
    assert leaves, name
    assert all(leaf.grad is not None for leaf in leaves), name
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


def exact(*operands: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in operands]


def assert_gradients(name: str, args: tuple[Any, ...], wanted: Tensor, leaves: list[Tensor]) -> None:
    output = getattr(ops, name)(*args)
    output = output[0] if isinstance(output, tuple) else output
    ours = gradients(name, args, output)
    wanted.backward(randn(*wanted.shape, seed=9).double())
    for got, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_linear_gradients() -> None:
    args = linear_args(PLAIN, (2, 3, 8))
    x, w, b = exact(values(args[3]), values(args[4]), args[2])
    assert_gradients("linear", args, F.linear(x, w, b), [x, w, b])


def test_linear_quantize_gradients() -> None:
    args = (*linear_args(PLAIN)[:-1], SPEC, None, torch.float32)
    x, w, b = exact(values(args[3]), values(args[4]), args[2])
    assert_gradients("linear_quantize", args, F.linear(x, w, b), [x, w, b])


def test_matmul_gradients() -> None:
    args = matmul_args(PLAIN)
    a, b = exact(values(args[2]), values(args[3]))
    assert_gradients("matmul", args, a @ b, [a, b])


def test_grouped_mm_gradients() -> None:
    args = grouped_args(PLAIN)
    x, w = exact(values(args[3]), values(args[4]))
    assert_gradients("grouped_mm", args, torch.cat([x[:2] @ w[0], x[2:5] @ w[2], torch.zeros(1, 4, dtype=torch.float64)]), [x, w])


@pytest.mark.parametrize("transposed", [False, True])
def test_conv_gradients(transposed: bool) -> None:
    args = list(conv_args(PLAIN))
    if transposed:
        args[1] = learned(4, 3, 3, 2, seed=2)
        args[4], args[11] = codes(args[1]), True
    x, w, b = exact(values(args[3]), values(args[4]), args[2])
    assert_gradients("conv", tuple(args), torch.convolution(x, w, b, *args[8:14]), [x, w, b])


@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_gradients(by_frequency: bool) -> None:
    args = list(embedding_args(PLAIN))
    args[7] = by_frequency
    (w,) = exact(values(args[2]))
    assert_gradients("embedding", tuple(args), F.embedding(INDEX, w, padding_idx=1, scale_grad_by_freq=by_frequency), [w])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp_gradients(act: str) -> None:
    """The hidden activation is rounded straight through: its value is the rounded one, its gradient the identity's."""
    args = mlp_args(PLAIN, act)
    x, w1, b1, w2, b2 = exact(values(args[5]), values(args[6]), args[2], values(args[7]), args[4])
    a = ACTIVATIONS[act](F.linear(x, w1, b1))
    rounded = values(list(ops.mlp(*args)[2:4]))
    assert_gradients("mlp", args, F.linear(a + (rounded - a).detach(), w2, b2), [x, w1, b1, w2, b2])


def test_layer_norm_quantize_gradients() -> None:
    args = norm_args()
    x, w, b = exact(*args[:3])
    assert_gradients("layer_norm_quantize", args, F.layer_norm(x, (8,), w, b), [x, w, b])


@pytest.mark.parametrize("residual", [False, True])
def test_norm_cast_gradients(residual: bool) -> None:
    """The gradient of the sum, which is an output too, is added to the norm's, and goes to both that were added."""
    x, r, w, b = learned(3, 8), learned(3, 8, seed=4), learned(8, seed=2), learned(8, seed=3)
    args = (x, r if residual else None, w, b, "layer", 1e-5, SPEC, None, "fc", None, None, "both")
    anchor, s, *_ = ops.norm_cast(*args)
    wanted = exact(x, r, w, b)
    total = wanted[0] + wanted[1] if residual else wanted[0]
    y = F.layer_norm(total, (8,), wanted[2], wanted[3])
    grads = randn(3, 8, seed=9), randn(3, 8, seed=10)
    torch.autograd.backward([anchor, *([s] if residual else [])], list(grads[: 1 + residual]))
    torch.autograd.backward([y, *([total] if residual else [])], [g.double() for g in grads[: 1 + residual]])
    for ours, leaf in zip((x, r, w, b), wanted, strict=True):
        if ours.grad is None or leaf.grad is None:
            assert ours.grad is leaf.grad is None
        else:
            torch.testing.assert_close(ours.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    assert s.numel() == (24 if residual else 0)


def test_anchors_pass_the_gradient_on() -> None:
    for args, name in (((*quantized(), SPEC, torch.bfloat16), "dequantize"), ((learned(3, 8), torch.bfloat16), "anchor")):
        (got,) = gradients(name, args, getattr(ops, name)(*args))
        assert torch.equal(got, randn(3, 8, seed=9).bfloat16().float())


def test_round_gradient_rounds_what_passes() -> None:
    x = learned(3, 8)
    (got,) = gradients("round_gradient", (x,), ops.round_gradient(x, SPEC, None, "attn", "grad_output"))
    assert torch.equal(got, values(codes(randn(3, 8, seed=9))).float())


def test_meter_row_counts_what_became_zero() -> None:
    """float32 [amax of dY, of dX, of dW, non-zero elements of dY, those that became zero], as the "gradient" of the meter."""
    args = list(linear_args(f"grad_output={SPEC.replace('current', 'none')};{PLAIN}"))
    y = ops.linear(*args)
    grad = torch.full_like(y, 2.0**-12)  # under half of the smallest e4m3ieee number, 2^-9
    grad[0] = 0
    grad[1, 0] = 1.5
    y.backward(grad)
    assert args[5].grad.tolist() == [1.5, -1, -1, 12, 11]  # -1: dX and dW are not quantized


@pytest.mark.parametrize("calibrating", [False, True])
def test_delayed_gradients_take_the_scales_they_are_given_and_measure(calibrating: bool) -> None:
    """Rounding under a given scale is checked on dX: the values of its codes. Calibrating rounds nothing and measures the same roles."""
    text = KEPT.replace("output,grad_input,grad_weight", "") + ";calibrating=yes" if calibrating else KEPT
    args = list(linear_args(text))
    args[3:5] = [[], []] if calibrating else args[3:5]
    ops.linear(*args).backward(grad := randn(3, 6, seed=9))
    x, w = (args[0].detach(), args[1].detach()) if calibrating else (values(args[3]).float(), values(args[4]).float())
    dy = grad if calibrating else values(list(ops.quantize(grad, DELAYED, [-1], None, "", "", scales()[0])[:2])).float()
    dx, dw = dy @ w, dy.mT @ x
    torch.testing.assert_close(args[5].grad[:3], torch.stack([grad.abs().max(), dx.abs().max(), dw.abs().max()]))
    rounded = dx if calibrating else values(list(ops.quantize(dx, DELAYED, [-1], None, "", "", scales()[1])[:2])).float()
    torch.testing.assert_close(args[0].grad, rounded)


def test_quantize_is_outside_of_autograd() -> None:
    outputs = ops.quantize(learned(3, 8), SPEC, [-1])
    assert not any(out.requires_grad for out in outputs)
    assert TensorSpec.parse(SPEC).text == SPEC
