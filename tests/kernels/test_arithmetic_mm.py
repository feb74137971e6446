"""The kernel of arithmetic studies has the bits of the reference's tiles; it compiles for Hopper in test_compiles.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fp8fx.arithmetic import gpu, product, register
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.errors import KernelError
from fp8fx.formats import get
from fp8fx.kernels.arithmetic_mm import Grid, arithmetic_mm

CASES = [
    "products=float16",
    "products=e4m3fn/overflow=saturate",
    "products=e5m2/rounding=up",
    "products=e3m4fn/rounding=down",
    "accumulate=e5m6/rounding=nearest_away",
    "accumulate=e4m7/rounding=toward_zero",
    "products=bfloat16/accumulate=bfloat16",
    "products=bfloat16/accumulate=e8m5/rounding=up/overflow=saturate",
    "accumulate=hopper_fast",
    "multiplier=mitchell/accumulate=float16",
    "multiplier=kernel_table/products=e5m4",
    "multiplier=kernel_codes/operands=e4m3fn/accumulate=float16",
]
generator = torch.Generator().manual_seed(3)
register("kernel_table", torch.rand(8, 8, generator=generator) * 3 + 1)
register("kernel_codes", torch.randn(256, 256, generator=generator))


def operands(m: int, k: int, n: int, finite: bool) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(*shape).mul(8).to(torch.float8_e4m3fn).float() for shape in ((m, k), (k, n)))
    a[3, 5], a[4], b[:, 6] = 448.0, 0.0, 2.0**-9
    if not finite:
        a[7, 1], b[2, 9], b[3, 9] = math.inf, math.nan, -math.inf
    return a, b


@pytest.mark.parametrize("text", CASES)
def test_the_bits_of_the_reference(text: str, device: str) -> None:
    arithmetic = Arithmetic.parse(text)
    m, k, n = (9, 40, 10) if "hopper" in text else (70, 6, 67) if text == CASES[0] else (9, 9, 10)
    a, b = operands(m, k, n, finite=arithmetic.accumulate != "hopper_fast" and "codes" not in text)
    steps, left, right = product.split(a, b, arithmetic, ("e4m3fn", "e4m3fn"))
    expected = steps.advance(torch.zeros(m, n), left, right)
    moved, *parts = product.split(a.to(device), b.to(device), arithmetic, ("e4m3fn", "e4m3fn"))
    actual = gpu.tiles_on_gpu(arithmetic, moved, *parts).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit()[~actual.isnan()], expected.signbit()[~expected.isnan()])


def test_what_it_has_not() -> None:
    x = torch.zeros(2, 2)
    grid = Grid(get("e4m3fnuz"))
    assert not grid.supported
    with pytest.raises(KernelError, match="no form for exact with e4m3fnuz"):
        arithmetic_mm(x, None, x, None, None, "exact", grid, grid)
    with pytest.raises(KernelError, match="got 'stochastic'"):
        Grid(get("e5m2"), "stochastic")
