"""The SQNR table of the flexible formats, by quadrature over the density, and the flexible quantizer's own rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.numerics import round_to_format
from fp8fx.numerics.flexible import flexible_quantize, int8_quantize, search_flexible

pytestmark = pytest.mark.core

POINTS = 40_000


def uniform() -> tuple[Tensor, Tensor]:
    x = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    return x, torch.full_like(x, 1.0 / POINTS)


def half_density(end: float, density: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Midpoints and weights on [0, end], dense near 0 where the mass is: x = sinh(u). Both densities are even, so half is enough."""
    edges = torch.linspace(0.0, math.asinh(end), POINTS + 1, dtype=torch.float64).sinh()
    x = (edges[1:] + edges[:-1]) / 2
    weight = density(x) * edges.diff()
    return x, weight / weight.sum()


def normal(x: Tensor) -> Tensor:
    return (-x.square() / 2).exp()


def student(x: Tensor) -> Tensor:
    return (1 + x.square() / 8) ** -4.5


DENSITIES = {
    "uniform": (uniform, 0.5, 2.2),
    "normal": (lambda: half_density(10.0, normal), 1.0, 40.0),
    "student": (lambda: half_density(100.0, student), 1.0, 40.0),
}
TABLE = {
    "uniform": (31.68, 37.51, 43.43, 49.26, 52.90),
    "normal": (25.58, 31.56, 37.56, 42.67, 40.57),
    "student": (24.31, 30.29, 36.27, 37.18, 33.16),
}


def best_decibels(quantize: Callable[[Tensor, float], Tensor], density: str) -> float:
    """-10 log10(MSE) at the best maximum: a coarse search, then a fine one around its winner."""
    make, low, high = DENSITIES[density]
    x, weight = make()

    def error(maximum: float) -> float:
        return float(((quantize(x, maximum) - x).square() * weight).sum())

    steps = 60
    for _ in range(2):
        width = (high - low) / steps
        best = min((low + i * width for i in range(steps + 1)), key=error)
        low, high = best - width, best + width
    return -10 * math.log10(error(best))


@pytest.mark.parametrize("density", TABLE)
@pytest.mark.parametrize(("column", "mantissa_bits"), [(0, 2), (1, 3), (2, 4), (3, 5), (4, None)])
def test_table(density: str, column: int, mantissa_bits: int | None) -> None:
    def quantize(x: Tensor, maximum: float) -> Tensor:
        return int8_quantize(x, maximum) if mantissa_bits is None else flexible_quantize(x, maximum, mantissa_bits)

    assert best_decibels(quantize, density) == pytest.approx(TABLE[density][column], abs=0.1)


def test_a_natural_maximum_gives_the_plain_grid() -> None:
    """E5M2 without specials goes to 114688; below E4M3's 480 the grid is that of e4m3fn."""
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50
    assert torch.equal(flexible_quantize(x, 480.0, 3).float(), round_to_format(x, "e4m3fn"))
    assert torch.equal(flexible_quantize(x, 114688.0, 2).float(), round_to_format(x, "e5m2"))


def test_all_values_of_a_flexible_format() -> None:
    for maximum, mantissa_bits in ((1.0, 3), (0.7, 5), (3.3, 2)):
        x = torch.linspace(0.0, 1.1, 200_001, dtype=torch.float64) * maximum
        y = flexible_quantize(x, maximum, mantissa_bits)
        assert y.max().item() == pytest.approx(maximum, rel=1e-12)
        assert len(y.abs().mul(1e9).round().unique()) <= 128
        assert torch.equal(flexible_quantize(-x, maximum, mantissa_bits), -y)


def test_gradients_reach_x_and_the_maximum() -> None:
    x = torch.tensor([0.3, -0.2, 5.0], requires_grad=True)
    maximum = torch.tensor(1.0, requires_grad=True)
    flexible_quantize(x, maximum, 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
    assert maximum.grad is not None
    assert maximum.grad.abs().item() > 0.5


def test_search_finds_the_format_of_the_data() -> None:
    values = torch.tensor(formats.get("e2m5").finite_values(), dtype=torch.float64)
    maximum, mantissa_bits = search_flexible(torch.linspace(-1, 1, 2001, dtype=torch.float64))
    assert mantissa_bits == 6
    assert maximum == pytest.approx(1.0, abs=0.02)
    error = (flexible_quantize(values, *search_flexible(values)) - values).square().mean()
    assert error <= (flexible_quantize(values, float(values.max()), 5) - values).square().mean()
    assert search_flexible(torch.zeros(3)) == (1.0, 3)
    assert search_flexible(torch.empty(0)) == (1.0, 3)
