"""A convolution whose weight has one scale per output channel: against torch's own on the dequantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8fx
from fp8fx import numerics
from fp8fx.spec import TensorSpec

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transposed groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 9)),
}


def recipe(**keys: Any) -> dict[str, Any]:
    weight = {"format": "int8", "granularity": "channel", **keys}
    return {"extends": "hybrid", "defaults": {"input": {"format": "int8"}, "weight": weight, "grad_output": {"format": "e5m2"}}}


def rounded(x: Tensor, spec: TensorSpec, dims: tuple[int, ...] = (-1,)) -> Tensor:
    codes, scale, _ = numerics.quantize_tensor(x, spec, dims)
    return numerics.dequantize_tensor(codes, scale, spec.format, spec.granularity)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("statistic", ["max", "mse"])
def test_forward_and_gradients(name: str, statistic: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = nn.Sequential(make(), nn.Identity())
    layer: Any = model[0]
    with torch.no_grad():  # channels of very different sizes, which one scale would not serve
        layer.weight.mul_(
            torch.logspace(-3, 3, layer.weight.shape[0 if not layer.transposed else 1]).reshape(
                [-1 if d == int(layer.transposed) else 1 for d in range(layer.weight.dim())]
            )
        )
    x = torch.randn(shape, requires_grad=True)
    fast = fp8fx.compile(model, recipe(statistic=statistic))
    y = fast(x)
    grad = torch.randn(y.shape)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), grad)
    assert fast.plan().rows[0].decision == "fp8", fast.plan().rows[0].reason

    dims = tuple(d for d in range(layer.weight.dim()) if d != int(layer.transposed))
    w = rounded(layer.weight, TensorSpec(format="int8", granularity="row", statistic=statistic), dims).requires_grad_()
    q = rounded(x, TensorSpec(format="int8")).requires_grad_()
    wanted = torch.func.functional_call(layer, {"weight": w}, (q,))
    dy = rounded(grad, TensorSpec(format="e5m2", overflow="nonfinite"))
    wanted_dx, wanted_dw = torch.autograd.grad(wanted, (q, w), dy)
    for got, expected in ((y, wanted), (dx, wanted_dx), (dw, wanted_dw)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")
def test_blocks_and_rows_of_the_input_stay_out() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    for keys in ({"weight": {"granularity": {"group": 4}}}, {"input": {"granularity": "row"}}):
        fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": keys})
        fast(torch.randn(2, 4, 9))
        assert fast.plan().rows[0].decision == "high_precision"
        assert "of its weight also channel" in fast.plan().rows[0].reason
