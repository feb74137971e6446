"""Arguments for every operator.

Codes are those of e4m3ieee, which has no torch dtype, so that they are uint8: opcheck's schema test cannot compare float8 tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from passes.trace import randn
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops.casts import RECORD
from fp8fx.ops.quantize import STATISTICS

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
        lambda: (randn(1, 8), DELAYED, None, "fc", "input", SCALE, None, "both"),
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
