"""The SQNR table of 8-bit formats, measured beside the reference, and the search for the best format of each distribution.

python examples/sqnr_table.py [--tiny]        exit code 1 if a figure is off by more than its tolerance, or another format is picked

Every figure is -10 log10(MSE) in dB of a distribution rounded to a format, by quadrature over the density: no sample, no luck. The formats
are flexible (fp8fx.numerics.flexible): no code is kept for NaN or inf, and the largest value is free. So it is searched, as post-training
quantization does: for the uniform distribution on [-1, 1] up to 2.2 times the largest |x|, for the others from 1 to 40. The reference is
Kuzmin et al., "FP8 Quantization: The Power of the Exponent" (2022); what there is to see: a format with more exponent bits covers more
range with coarser steps, and the heavier the tails, the more exponent it takes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.numerics.flexible import flexible_quantize, int8_quantize

TOLERANCE = 0.1  # dB
FORMATS: dict[str, int | None] = {"E5M2": 2, "E4M3": 3, "E3M4": 4, "E2M5": 5, "INT8": None}  # mantissa bits


@dataclass(frozen=True)
class Distribution:
    """An even density, cut at `end`. low, high: of the search for the largest value. reference: dB, in the order of FORMATS."""

    name: str
    density: Callable[[Tensor], Tensor]
    end: float
    low: float
    high: float
    reference: tuple[float, ...]
    best: str


DISTRIBUTIONS = (
    Distribution("uniform on [-1, 1]", torch.ones_like, 1.0, 0.5, 2.2, (31.68, 37.51, 43.43, 49.26, 52.90), "INT8"),
    Distribution("normal", lambda x: (-x.square() / 2).exp(), 10.0, 1.0, 40.0, (25.58, 31.56, 37.56, 42.67, 40.57), "E2M5"),
    Distribution("Student t, nu 8", lambda x: (1 + x.square() / 8) ** -4.5, 100.0, 1.0, 40.0, (24.31, 30.29, 36.27, 37.18, 33.16), "E2M5"),
)  # fmt: skip


def quadrature(distribution: Distribution, points: int) -> tuple[Tensor, Tensor]:
    """Midpoints and weights (sum 1) on [0, end], dense near 0: x = sinh(u). Half the axis is enough: the density is even."""
    edges = torch.linspace(0.0, math.asinh(distribution.end), points + 1, dtype=torch.float64).sinh()
    x = (edges[1:] + edges[:-1]) / 2
    weight = distribution.density(x) * edges.diff()
    return x, weight / weight.sum()


def best_maximum(mantissa_bits: int | None, distribution: Distribution, points: int) -> tuple[float, float]:
    """(dB, largest value) of the format at its best: a coarse search, then a fine one around its winner."""
    x, weight = quadrature(distribution, points)

    def error(maximum: float) -> float:
        y = int8_quantize(x, maximum) if mantissa_bits is None else flexible_quantize(x, maximum, mantissa_bits)
        return float(((y - x).square() * weight).sum())

    low, high, steps = distribution.low, distribution.high, 60
    best = low
    for _ in range(2):
        width = (high - low) / steps
        best = min((low + i * width for i in range(steps + 1)), key=error)
        low, high = best - width, best + width
    return -10 * math.log10(error(best)), best


def row(distribution: Distribution, points: int) -> bool:
    """Print one distribution's row; True if all of it is as it should be."""
    found = {name: best_maximum(bits, distribution, points) for name, bits in FORMATS.items()}
    print(f"\n{distribution.name}")
    right = True
    for (name, (decibels, maximum)), wanted in zip(found.items(), distribution.reference, strict=True):
        passed = abs(decibels - wanted) <= TOLERANCE
        right &= passed
        figures = f"{decibels:6.2f} dB   reference {wanted:6.2f}   off by {decibels - wanted:+.3f}   best maximum {maximum:6.3f}"
        print(f"  {name}   {figures}   {_word(passed)}")
    picked = max(found, key=lambda name: found[name][0])
    passed = picked == distribution.best
    print(f"  the search picks {picked}, the best known is {distribution.best}   {_word(passed)}")
    return right and passed


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def main(tiny: bool = False) -> int:
    """tiny: a coarser quadrature, which the tolerance still holds for."""
    print(f"-10 log10(MSE) of each format at its best maximum; tolerance {TOLERANCE} dB")
    results = [row(distribution, 4_000 if tiny else 40_000) for distribution in DISTRIBUTIONS]
    print(f"\n{_word(all(results))}: {len(DISTRIBUTIONS) * len(FORMATS)} figures and {len(DISTRIBUTIONS)} searches")
    return 0 if all(results) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a coarser quadrature")
    sys.exit(main(**vars(parser.parse_args())))
