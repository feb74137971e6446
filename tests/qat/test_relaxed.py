"""Gradients of learned rounding, against finite differences of the function they belong to, written down here once more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.numerics import compute_scale, inverse, round_to_format
from fp8fx.qat.relaxed import learned_round, with_mantissa

FORMATS = ("e5m2", "e4m3fn", "e3m4fn", "e2m5none", "e3m2", "int8", "int4", "ue4m4none")


def relaxed(x: Tensor, x0: Tensor, top: Tensor, top0: float, m: Tensor, format: formats.Format) -> Tensor:
    """float64: clip(x) + s c with the rounding error c, in steps, and each element's binade held at (x0, top0, format)."""
    scale0 = top0 / format.max
    bias0 = 2.0**format.exponent_bits - math.log2(top0) + math.log2(2 - 2.0**-format.mantissa_bits) - 1
    y0 = round_to_format((x0 / scale0).clamp(-format.max, format.max), format).double() * scale0
    binade = (x0.abs() / scale0).log2().floor()
    low = binade <= format.emin
    step0 = torch.where(low, format.min_subnormal * scale0, 2.0 ** (binade - format.mantissa_bits) * scale0)
    clipped0 = x0.clamp(-top0 if format.signed else 0.0, top0)
    c = (y0 - clipped0) / step0
    c = torch.where(x0 == clipped0, c, 0.0)
    free = format.exponent_bits + format.mantissa_bits
    bias = 2.0 ** (free - m) - top.log2() + (2 - 2.0**-m).log2() - 1
    change = torch.where(low, bias0 - bias, 0.0) - (m - format.mantissa_bits)
    step = step0 * 2.0**change
    return torch.minimum(torch.maximum(x, -top if format.signed else 0.0 * top), top) + step * c


def samples(top: float) -> Tensor:
    """Values of all sizes, none within reach of a finite difference of the edge."""
    torch.manual_seed(0)
    x = torch.randn(4000, dtype=torch.float64) * torch.exp(1.5 * torch.randn(4000, dtype=torch.float64)) * top / 4
    return x[((x.abs() / top - 1.0).abs() > 1e-3) & (x.abs() > 1e-6)].float().double()


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_relaxed_function(name: str) -> None:
    format, top0, h = formats.get(name), 3.0, 1e-5
    x = samples(top0)
    weight = torch.randn(x.shape, dtype=torch.float64)
    learns_bits = format.nan == "none" and not format.integer
    leaf = x.float().requires_grad_()
    top = torch.tensor(top0, requires_grad=True)
    m = torch.tensor(float(format.mantissa_bits), requires_grad=True) if learns_bits else None
    y = learned_round(leaf, top, format, m)
    (y * weight.float()).sum().backward()

    def at(dx: float = 0.0, dtop: float = 0.0, dm: float = 0.0) -> Tensor:
        t, bits = torch.tensor(top0 + dtop, dtype=torch.float64), torch.tensor(format.mantissa_bits + dm, dtype=torch.float64)
        return relaxed(x + dx, x, t, top0, bits, format)

    assert torch.allclose(at().float(), y, rtol=1e-6, atol=1e-7)
    assert torch.allclose(((at(dx=h) - at(dx=-h)) / (2 * h) * weight).float(), leaf.grad, atol=1e-5)
    numeric = float(((at(dtop=h) - at(dtop=-h)) / (2 * h) * weight).sum())
    assert float(top.grad) == pytest.approx(numeric, rel=1e-3, abs=1e-3)
    if m is not None:
        numeric = float(((at(dm=h) - at(dm=-h)) / (2 * h) * weight).sum())
        assert float(m.grad) == pytest.approx(numeric, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_forward_is_that_of_a_fixed_scale(name: str) -> None:
    format, x, top = formats.get(name), torch.randn(1000), torch.tensor(1.7)
    scale = compute_scale(top, format)
    assert torch.equal(learned_round(x, top, format), round_to_format(x * inverse(scale), format) * scale)


def test_gradients_by_row() -> None:
    """A largest value per row gets the sum over its row."""
    x, top = torch.randn(3, 50), torch.tensor([[0.5], [1.0], [2.0]], requires_grad=True)
    learned_round(x, top, formats.get("int8")).square().sum().backward()
    for row in range(3):
        alone = top[row].detach().requires_grad_()
        learned_round(x[row], alone, formats.get("int8")).square().sum().backward()
        assert torch.allclose(top.grad[row], alone.grad, rtol=1e-5)


@pytest.mark.parametrize(("sample", "start", "expected"), [("uniform", 2, 6), ("normal", 2, 5), ("normal", 6, 5), ("heavy", 6, (3, 4))])
def test_descent_on_the_error_finds_the_mantissa(sample: str, start: int, expected: int | tuple[int, ...]) -> None:
    """From either side, and with the largest value learned too. The heavy tail is that of a normal to the third power."""
    torch.manual_seed(1)
    normal = torch.randn(8192)
    x = {"uniform": torch.rand(8192) * 2 - 1, "normal": normal, "heavy": normal**3}[sample]
    format = with_mantissa(formats.get("e4m3fn"), start)
    m = torch.tensor(float(start), requires_grad=True)
    log2_top = x.abs().max().log2().requires_grad_()
    optimizer = torch.optim.Adam([m, log2_top], lr=0.05)
    for _ in range(150):
        error = (learned_round(x, log2_top.exp2(), format, m) - x).square().mean()
        optimizer.zero_grad()
        error.log().backward()
        optimizer.step()
    wanted = (expected,) if isinstance(expected, int) else expected
    assert int(m.detach().round().clamp(1, 6)) in wanted


def test_bits_stay_within_reach() -> None:
    """Beyond the range only gradients that lead back pass."""
    x, format = torch.rand(1000) * 2 - 1, formats.get("e1m6none")
    m = torch.tensor(6.4, requires_grad=True)
    (learned_round(x, torch.tensor(1.0), format, m) - x).square().mean().backward()
    assert float(m.grad) >= 0.0
    assert with_mantissa(formats.get("ue4m4none"), 9).name == "ue1m7none"
