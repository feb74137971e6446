"""How operands, outputs and scales lie: memory formats, and blocks along the contraction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.layers import Layers, randn, recipe, similar
from torch import Tensor, nn

import fp8fx
from fp8fx import numerics
from fp8fx.spec import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")


# -- memory format ----------------------------------------------------------------------------------------------------------


LAST = torch.channels_last


class Pixels(nn.Module):
    """Only an output that lies channels last can be viewed as one row per pixel."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 8, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x).permute(0, 2, 3, 1).view(-1, 8)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_channels_last_stays(inner: str) -> None:
    model = Pixels().to(memory_format=LAST)
    x = randn(2, 4, 6, 6).to(memory_format=LAST).requires_grad_()
    fast = fp8fx.compile(model, "hybrid", inner=inner)
    y = fast(x)
    y.square().sum().backward()
    assert similar(y.detach(), model(x).detach())
    assert x.grad is not None


def test_a_rounded_output_lies_as_the_convolution_left_it() -> None:
    fast = fp8fx.compile(Pixels().to(memory_format=LAST), "direct")
    assert fast(randn(2, 4, 6, 6).to(memory_format=LAST)).shape == (72, 8)


CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 8, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 7, 6)),
    "conv2d 1x1": (nn.Conv2d(4, 8, 1), (2, 4, 1, 1)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d(4, 8, 3), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("gemms", ["fp8", "high_precision"])
@pytest.mark.parametrize("last", ["", "x", "w", "xw"])
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_lies_as_torch_leaves_it(name: str, last: str, gemms: str) -> None:
    conv, shape = CONVS[name]
    x = randn(*shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats:
        conv = conv.to(memory_format=formats[x.dim()] if "w" in last else torch.contiguous_format)
        x = x.to(memory_format=formats[x.dim()]) if "x" in last else x
    fast = fp8fx.compile(conv, recipe(gemms={"output": gemms}))
    assert fast(x).stride() == conv(x).stride()


# -- blocks -----------------------------------------------------------------------------------------------------------------


def dequantized(x: Tensor, grain: Any, format: str = "e4m3fn") -> Tensor:
    """`x` on the grid, float64, with its last dimension contracted."""
    overflow = "nonfinite" if format == "e5m2" else "saturate"
    spec = TensorSpec(format=format, granularity=grain, overflow=overflow)
    q, scale, _ = numerics.quantize_tensor(x.detach().contiguous(), spec, (-1,))
    return numerics.dequantize_tensor(q, scale, format, grain).double()


def close(ours: Tensor | None, theirs: Tensor) -> bool:
    assert ours is not None
    return float((ours.detach().double() - theirs).norm()) <= 1e-5 * float(theirs.norm())


BLOCKS = [((1, 8), (8, 8), (1, 8)), ((1, 8), (2, 8), (1, 8)), ((1, 7), (5, 9), (2, 6))]


@pytest.mark.parametrize(("gx", "gw", "gg"), BLOCKS)
def test_a_block_lies_along_the_contraction(gx: Any, gw: Any, gg: Any) -> None:
    """A right operand [K, N] has the numbers of the linear whose weight is its transpose."""
    model = Layers(lambda self, x: x @ self.cache)
    model.cache = nn.Parameter(randn(24, 20, seed=3))
    grains = {"input": {"granularity": list(gx)}, "weight": {"granularity": list(gw)}, "grad_output": {"granularity": list(gg)}}
    fast = fp8fx.compile(model, recipe(**grains))
    x, dy = randn(2, 5, 24).requires_grad_(), randn(2, 5, 20, seed=5)
    w = model.cache
    y = fast(x)
    y.backward(dy)
    assert close(y, dequantized(x, gx) @ dequantized(w.mT, gw).mT)
    assert close(x.grad, dequantized(dy, gg, "e5m2") @ dequantized(w, gw).mT)
    assert close(fast.cache.grad, (dequantized(x.mT, gx) @ dequantized(dy.mT, gg, "e5m2").mT).sum(0))


@pytest.mark.parametrize(("gx", "gw", "gg"), BLOCKS)
def test_a_weight_on_the_left(gx: Any, gw: Any, gg: Any) -> None:
    """`W @ x` has the numbers of `x^T W^T`: the parameter takes the role weight, and its gradient grad_weight."""
    model = Layers(lambda self, x: self.cache @ x)
    model.cache = nn.Parameter(randn(20, 24, seed=3))
    grains = {"input": {"granularity": list(gx)}, "weight": {"granularity": list(gw)}, "grad_output": {"granularity": list(gg)}}
    grains["grad_weight"] = {"format": "e5m2", "granularity": "tensor"}  # type: ignore[dict-item]
    fast = fp8fx.compile(model, recipe(**grains))
    x, dy = randn(24, 10).requires_grad_(), randn(20, 10, seed=5)
    w = model.cache
    y = fast(x)
    y.backward(dy)
    assert close(y, dequantized(w, gw) @ dequantized(x.mT, gx).mT)
    assert close(x.grad, dequantized(w.mT, gw) @ dequantized(dy.mT, gg, "e5m2").mT)
    exact = dequantized(dy, gg, "e5m2") @ dequantized(x, gx).mT
    assert similar(fast.cache.grad.double(), exact)
    assert not close(fast.cache.grad, exact)  # rounded by its role
