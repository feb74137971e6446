"""Every operator: torch's own checks of schema, fake and autograd registration, and gradients against float64.

Codes are those of e4m3ieee, which has no torch dtype, so that they are uint8: opcheck's schema test cannot compare float8 tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes.trace import randn
from torch import Tensor
from torch.nn import functional as F

from fp8fx import numerics
from fp8fx.ops.casts import RECORD
from fp8fx.ops.library import REFERENCES
from fp8fx.ops.quantize import STATISTICS
from fp8fx.spec import TensorSpec

ops = torch.ops.fp8fx
SPEC = "e4m3ieee/current/tensor/nearest_even/saturate"
RANDOM = "e4m3ieee/none/tensor/stochastic/saturate"
BACKWARD = f"grad_output={SPEC};grad_input={RANDOM};grad_weight={SPEC};gemms=output,grad_input,grad_weight"
PLAIN = "gemms=output,grad_input,grad_weight"  # dY as it is: gradients are those of the dequantized operands
RNG = torch.tensor([3, 1, 4])
DELAYED = SPEC.replace("current", "delayed")
KEPT = f"grad_output={DELAYED};grad_input={DELAYED};grad_weight={DELAYED};gemms=output,grad_input,grad_weight"
SCALE = torch.tensor(0.125)


def codes(x: Tensor, spec: str = SPEC) -> list[Tensor]:
    return list(ops.quantize(x.detach(), spec, [-1])[:2])


def values(pair: list[Tensor]) -> Tensor:
    """float64 decode(q) * scale."""
    return numerics.decode(pair[0], "e4m3ieee").double() * pair[1].double()


def learned(*shape: int, seed: int = 1) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


def meter() -> Tensor:
    return torch.zeros(STATISTICS, requires_grad=True)


def scales() -> Tensor:
    """Of grad_output, grad_input and grad_weight."""
    return torch.tensor([0.25, 0.125, 0.5])


def linear_args(backward: str, x_shape: tuple[int, ...] = (3, 8)) -> tuple[Any, ...]:
    x, w, b = learned(*x_shape), learned(6, 8, seed=2), learned(6, seed=3)
    return x, w, b, codes(x), codes(w), meter(), scales(), RNG, "fc", SPEC, SPEC, backward, torch.float32


def recorded_args(backward: str) -> tuple[Any, ...]:
    """The form for kernels: a record in place of the meter."""
    args = linear_args(backward)
    return *args[:5], torch.zeros(3, RECORD), *args[6:]


def act_linear_args(activation: str, gated: bool, scaling: str = "current", kept: str = "") -> tuple[Any, ...]:
    spec = SPEC.replace("current", scaling)
    x, w1, w2, bias = learned(2, 3, 8), learned(6, 8, seed=2), learned(6, 8, seed=3) if gated else None, learned(6, seed=4)
    q, qt, scale, _ = ops.cast_current(x.detach(), SPEC, None, "fc", "input", None, "both")
    backward = f"grad_output={spec};gemms=output,grad_input,grad_weight;columns=yes{kept}"
    weight2 = codes(w2) if w2 is not None else []
    return (
        x, w1, w2, bias, None, [q, scale, qt, scale], codes(w1), weight2, torch.zeros(3, RECORD), torch.zeros(3, RECORD), scales(),
        scales(), SCALE if scaling == "delayed" else None, None, RNG, activation, "gate", "up", SPEC, SPEC, SPEC, backward, backward,
        spec, "down", "both", torch.float32,
    )  # fmt: skip


def matmul_args(backward: str) -> tuple[Any, ...]:
    a, b = learned(2, 3, 8), learned(8, 6, seed=2)
    return a, b, codes(a), codes(b), meter(), scales(), RNG, "scores", SPEC, SPEC, backward, torch.float32


GEOMETRY = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)


def conv_args(backward: str) -> tuple[Any, ...]:
    x, w, b = learned(2, 4, 7, 6), learned(6, 2, 3, 2, seed=2), learned(6, seed=3)
    return x, w, b, codes(x), codes(w), meter(), scales(), RNG, *GEOMETRY, "conv", SPEC, SPEC, backward, torch.float32


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # groups of 2, 0 and 3 rows, and one row more that is in none


def grouped_args(backward: str) -> tuple[Any, ...]:
    x, w = learned(6, 8), learned(3, 8, 4, seed=2)
    return x, w, ENDS, codes(x), codes(w), meter(), scales(), RNG, "experts", SPEC, SPEC, backward, torch.float32


def scaled_grouped_args(of_weight: bool) -> tuple[Any, ...]:
    a, b = codes(randn(6, 8)), codes(randn(6, 4) if of_weight else randn(3, 8, 4))
    return *a, "e4m3ieee", *b, "e4m3ieee", ENDS, torch.float32


INDEX = torch.tensor([[0, 3, 3], [7, 1, 3]])


def embedding_args(backward: str) -> tuple[Any, ...]:
    w = learned(8, 6)
    return INDEX, w, codes(w), meter(), scales(), RNG, 1, False, "embed", SPEC, backward, torch.float32


def mlp_args(backward: str, act: str = "gelu") -> tuple[Any, ...]:
    x, w1, b1 = learned(3, 8), learned(10, 8, seed=2), learned(10, seed=3)
    w2, b2 = learned(6, 10, seed=4), learned(6, seed=5)
    texts = ("up", SPEC, SPEC, backward, torch.float32, "down", SPEC, SPEC, backward, torch.float32)
    return x, w1, b1, w2, b2, codes(x), codes(w1), codes(w2), meter(), meter(), scales(), scales(), None, RNG, act, *texts


def norm_args() -> tuple[Any, ...]:
    return learned(3, 8), learned(8, seed=2), learned(8, seed=3), [8], 1e-5, SPEC, [-1], None, "fc", "input", None


def scaled_mm_args(block: list[int]) -> tuple[Any, ...]:
    spec = SPEC if not block else SPEC.replace("tensor", f"{block[0]}x{block[1]}")
    a, b = codes(randn(6, 8), spec), codes(randn(4, 8, seed=2), spec)
    right = (b[0].mT, b[1].mT if b[1].dim() else b[1], "e4m3ieee", block[::-1])
    return a[0], a[1], "e4m3ieee", block, *right, randn(4), torch.float32


def quantized() -> tuple[Tensor, Tensor, Tensor]:
    x = learned(3, 8)
    return x, *codes(x)  # type: ignore[return-value]


def gradient_args(of_input: bool) -> tuple[Any, ...]:
    grad, other = codes(randn(2, 6, 4, 4)), codes(randn(6, 2, 3, 2) if of_input else randn(2, 4, 7, 6))
    size = [2, 4, 7, 6] if of_input else [6, 2, 3, 2]
    return *grad, "e4m3ieee", *other, "e4m3ieee", size, of_input, *GEOMETRY, torch.float32


def with_transposes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """weight_transpose: keep."""
    both = [[q, scale, q.mT.contiguous().mT, scale.clone()] for q, scale in (args[6], args[7])]
    return *args[:6], *both, *args[8:]


IN_FP8 = ";save_activation_inputs=fp8"


def hidden() -> tuple[Tensor, Tensor, Tensor]:
    return randn(3, 8), randn(3, 8, seed=2), randn(3, 8, seed=3)


def kept(m: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of h, as `act` keeps them."""
    return ops.act(randn(m, k, seed=2), None, "silu")[1:3]  # type: ignore[no-any-return]


def hidden_kept() -> tuple[Tensor, ...]:
    q, scale = kept(3, 8)
    return randn(3, 8), q, q.clone(), scale, scale.clone()


def meter_row_args() -> tuple[Any, ...]:
    x = randn(3, 8)
    q, _, amax = ops.quantize(x, SPEC, [-1])
    return x, q, SPEC, amax, None, torch.tensor(0.5)


SAMPLES: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "quantize": [
        lambda: (learned(3, 8), SPEC, [-1]),
        lambda: (learned(3, 8), RANDOM, [-1], RNG, "fc", "input"),
        lambda: (learned(3, 8), DELAYED, [-1], None, "fc", "input", SCALE),
    ],
    "cast": [
        lambda: (learned(2, 3, 8), DELAYED, None, "fc", "input", SCALE, None, "both"),
        lambda: (randn(3, 8), RANDOM, RNG, "fc", "input", None, None, "transposed"),
        lambda: (randn(3, 8), DELAYED, None, "fc", "input", SCALE, None, "rows"),
    ],
    "cast_current": [
        lambda spec=spec, layout=layout: (learned(2, 3, 8), spec, None, "fc", "input", None, layout)
        for spec in (SPEC, SPEC.replace("tensor", "row"), SPEC.replace("tensor", "1x4"))
        for layout in ("rows", "transposed", "both")
    ],
    "cast_amax": [
        lambda layout=layout: (learned(2, 3, 8), torch.tensor(3.0), SPEC, None, "fc", "input", None, layout)
        for layout in ("rows", "transposed", "both")
    ],
    "norm_cast": [
        lambda kind=kind, residual=residual, spec=spec: (
            learned(2, 3, 8),
            residual,
            learned(8, seed=2),
            learned(8, seed=3) if kind == "layer" else None,
            kind,
            1e-5,
            spec,
            None,
            "fc",
            SCALE if spec == DELAYED else None,
            None,
            "both",
        )
        for kind, residual, spec in (("layer", learned(2, 3, 8, seed=4), SPEC), ("rms", None, DELAYED), ("rms_rounded", None, SPEC))
    ],
    "norm_backward": [
        lambda add=add, kind=kind: (
            randn(3, 8),
            randn(3, 8, seed=2),
            randn(8),
            randn(8) if kind == "layer" else None,
            randn(3, 1),
            randn(3, 1),
            add,
            kind,
            1e-5,
        )
        for add, kind in ((randn(3, 8, seed=3), "layer"), (None, "rms"))
    ],
    "dequantize": [lambda: (*quantized(), SPEC, torch.float32), lambda: (*quantized(), SPEC, torch.bfloat16)],
    "anchor": [lambda: (learned(3, 8), torch.float32)],
    "round_values": [
        lambda: (randn(3, 8), SPEC, None, "fc", "grad_input"),
        lambda: (randn(3, 8), RANDOM, RNG, "fc", "grad_input"),
        lambda: (randn(3, 8), DELAYED, None, "fc", "grad_input", SCALE),
    ],
    "round_gradient": [lambda: (learned(3, 8), SPEC, None, "attn", "grad_output")],
    "meter_row": [meter_row_args, lambda: (randn(3, 8), None, "", None, None, None)],
    "rounded_mm": [lambda: (*scaled_mm_args([]), "precise", RANDOM, RNG, "fc", "output")],
    "stochastic_mm": [lambda: (*scaled_mm_args([]), "products=e5m2/rounding=stochastic", RNG, "fc", "grad_input")],
    "scaled_mm": [lambda: scaled_mm_args([]), lambda: scaled_mm_args([1, 4]), lambda: scaled_mm_args([4, 4])],
    "linear": [
        lambda: linear_args(BACKWARD),
        lambda: linear_args(BACKWARD, (2, 3, 8)),
        lambda: linear_args("gemms=grad_weight"),
        lambda: linear_args(KEPT),
        lambda: recorded_args(KEPT + ";columns=yes"),
        lambda: recorded_args(f"output={RANDOM};grad_output={SPEC};grad_input={RANDOM};{PLAIN};columns=yes"),
        lambda: linear_args(KEPT.replace("output,grad_input,grad_weight", "") + ";calibrating=yes"),
    ],
    "act_linear": [
        lambda: act_linear_args("silu", True),
        lambda: act_linear_args("gelu", False, "delayed"),
        lambda: act_linear_args("relu", True, "delayed"),
        lambda: act_linear_args("silu", True, "delayed", IN_FP8),
        lambda: act_linear_args("gelu", False, "current", IN_FP8),
        lambda: with_transposes(act_linear_args("silu", True)),
    ],
    "act": [lambda: (learned(2, 3, 130), learned(2, 3, 130, seed=2), "silu"), lambda: (learned(3, 8), None, "gelu")],
    "act_backward": [
        lambda: (randn(2, 3, 130), *kept(6, 130), *kept(6, 130), "silu"),
        lambda: (randn(3, 8), *kept(3, 8), None, None, "gelu"),
    ],
    "act_backward_cast": [
        lambda: (*hidden(), None, None, "silu", None, "gate", "up", SPEC, None, None, None, None, "both", True),
        lambda: (*hidden()[:2], randn(0), None, None, "gelu", None, "fc", "", DELAYED, SCALE, None, None, None, "transposed", False),
        lambda: (*hidden_kept(), "silu", None, "gate", "up", DELAYED, SCALE, SCALE, None, None, "both", True),
    ],
    "act_backward_gate": [
        lambda: (*hidden(), None, None, "silu", None, "gate", SPEC, None, None, "both", True),
        lambda: (*hidden_kept(), "silu", None, "gate", DELAYED, SCALE, None, "transposed", False),
    ],
    "act_backward_up": [
        lambda: (*hidden()[:2], None, "silu", None, "up", SPEC, None, torch.ones(1), None, "both", True),
        lambda: (randn(3, 8), *kept(3, 8), "silu", None, "up", DELAYED, SCALE, None, None, "transposed", False),
    ],
    "matmul": [lambda: matmul_args(BACKWARD), lambda: matmul_args("gemms=output"), lambda: matmul_args(KEPT)],
    "grouped_mm": [lambda: grouped_args(BACKWARD), lambda: grouped_args("gemms=grad_weight"), lambda: grouped_args(KEPT)],
    "scaled_grouped_mm": [lambda: scaled_grouped_args(False), lambda: scaled_grouped_args(True)],
    "conv": [lambda: conv_args(BACKWARD), lambda: conv_args("gemms=grad_input"), lambda: conv_args(KEPT)],
    "conv_gradient": [lambda: gradient_args(True), lambda: gradient_args(False)],
    "embedding": [lambda: embedding_args(BACKWARD), lambda: embedding_args(KEPT)],
    "embedding_gradient": [lambda: (*codes(randn(2, 3, 6)), "e4m3ieee", INDEX, 8, -1, True)],
    "layer_norm_quantize": [norm_args],
    "linear_quantize": [lambda: (*linear_args(BACKWARD)[:-1], SPEC, None, torch.float32)],
    "mlp": [lambda: mlp_args(BACKWARD), lambda: mlp_args(KEPT)],
}


def test_every_operator_has_a_sample() -> None:
    assert SAMPLES.keys() == REFERENCES.keys()


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck(name: str, index: int) -> None:
    torch.library.opcheck(getattr(ops, name).default, SAMPLES[name][index]())


# -- gradients against float64 autograd of the dequantized operands ----------------------------------------------------------------


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
