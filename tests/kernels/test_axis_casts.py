"""Casts under scales of rows and of columns with stochastic rounding; every bfloat16 value under scales made on the way."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import every_16_bits, random_bits, same_bytes, same_floats, same_transposed, specials
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.numerics.tensor import quantize_scaled
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels.cast import Rounding, cast, cast_current

FORMATS = ("e4m3fn", "e5m2")
OVERFLOWS = ("saturate", "nonfinite")
DIMS = {"row": (-1,), "column": (-2,)}
RNG, KEY = torch.tensor([0x1234567_89ABCDEF, 6, 7]), 0xDEADBEEF
CASES = [((66, 131), "e4m3fn"), ((2, 9, 36), "e5m2"), ((5, 7), "e5m2")]


def stochastic(overflow: str, device: str) -> Rounding:
    return Rounding("stochastic", overflow, RNG.to(device), KEY)


def check_current(x: Tensor, format: str, sides: tuple[str, str], layout: str, how: Rounding, power_of_two: bool, device: str) -> None:
    """q under scales of sides[0], qT under those of sides[1], whichever `layout` has."""
    bits = random_bits(x.shape, RNG, KEY) if how.stochastic else None
    made = cast_current(x.to(device), format, *sides, layout, how, power_of_two)
    results = (made.q, made.scale, made.amax), (made.q_t, made.scale_t, made.amax_t)
    for same, side, (codes, scale, largest) in zip((same_bytes, same_transposed), sides, results, strict=True):
        if layout not in ("both", "rows" if same is same_bytes else "transposed"):
            assert codes is None
            continue
        spec = TensorSpec(format=format, granularity="row", rounding=how.rounding, overflow=how.overflow, power_of_two=power_of_two)
        expected, wanted, biggest = numerics.quantize_tensor(x, spec, DIMS[side], bits)
        same(codes, expected)
        same_floats(scale, wanted)
        same_floats(largest, biggest)


@pytest.mark.parametrize(("shape", "format"), CASES, ids=str)
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_stochastic_with_given_scales(device: str, granularity: str, shape: tuple[int, ...], format: str) -> None:
    x = specials(torch.randn(shape) * 100).to(torch.bfloat16)
    scale = torch.rand(numerics.amax(x, "row", DIMS[granularity]).shape) + 0.1
    for overflow, layout in zip((*OVERFLOWS, "saturate"), ("both", "rows", "transposed"), strict=True):
        bits = random_bits(x.shape, RNG, KEY)
        expected = quantize_scaled(x, formats.get(format), scale, "row", "stochastic", overflow, bits)
        q, t = cast(x.to(device), format, scale.to(device), granularity, layout, stochastic(overflow, device))
        if layout != "transposed":
            same_bytes(q, expected)
        if layout != "rows":
            same_transposed(t, expected)


@pytest.mark.parametrize(("shape", "format"), CASES, ids=str)
@pytest.mark.parametrize("sides", list(itertools.product(DIMS, DIMS)), ids=str)
def test_stochastic_with_current_scales(device: str, sides: tuple[str, str], shape: tuple[int, ...], format: str) -> None:
    x = specials(torch.randn(shape)).to(torch.bfloat16)
    x[..., 2, :], x[..., 3] = 0.0, 0.0
    for i, layout in enumerate(("both", "rows", "transposed")):
        check_current(x, format, sides, layout, stochastic(OVERFLOWS[i % 2], device), i == 1, device)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("format", FORMATS)
def test_all_bfloat16_inputs(device: str, format: str, rounding: str) -> None:
    """By rows in one read (`cast_rows`) and in two, by rows and columns."""
    x = every_16_bits(torch.bfloat16)[:, torch.randperm(256)]  # each row has some large values
    cases = list(zip(OVERFLOWS, (False, True), strict=True))
    if device == "cpu":
        cases = cases[:1] if rounding == "nearest_even" else cases[1:]
    for overflow, power_of_two in cases:
        how = Rounding(rounding, overflow, RNG.to(device), KEY)
        check_current(x, format, ("row", "row"), "rows", how, power_of_two, device)
        check_current(x, format, ("row", "column"), "both", how, power_of_two, device)
        scale, bits = torch.rand(256, 1) + 0.1, random_bits(x.shape, RNG, KEY)
        q, t = cast(x.to(device), format, scale.to(device), "row", "both", how)
        expected = quantize_scaled(x, formats.get(format), scale, "row", rounding, overflow, bits)
        same_bytes(q, expected)
        same_transposed(t, expected)
