"""The tiles as one Triton kernel: what `product` runs on a GPU. Imports Triton, so that only `product` imports this."""

from __future__ import annotations

from torch import Tensor

from fp8fx.arithmetic.numbers import MODES, number
from fp8fx.arithmetic.operands import Parts
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.arithmetic.tiles import Steps
from fp8fx.kernels.arithmetic_mm import Grid, arithmetic_mm


def grids(arithmetic: Arithmetic, steps: Steps) -> tuple[Grid, Grid]:
    """How products and sums are rounded."""
    names = (arithmetic.products, "float32" if steps.hopper else arithmetic.accumulate)
    products, sums = (Grid(number(name), arithmetic.rounding, arithmetic.overflow) for name in names)
    return products, sums


def supported(arithmetic: Arithmetic, steps: Steps) -> bool:
    """The kernel has these formats, and no random bits."""
    return arithmetic.rounding in MODES and all(grid.supported for grid in grids(arithmetic, steps))


def tiles_on_gpu(arithmetic: Arithmetic, steps: Steps, a: Parts, b: Parts) -> Tensor:
    """float32 [M, N] from parts [K, M] and [K, N]: `steps.advance` of zeros, with the same bits."""
    details = [None if parts.detail is None else parts.detail.contiguous() for parts in (a, b)]
    products, sums = grids(arithmetic, steps)
    values = a.values.contiguous(), b.values.contiguous()
    return arithmetic_mm(values[0], details[0], values[1], details[1], steps.table, steps.kind, products, sums, steps.hopper)
