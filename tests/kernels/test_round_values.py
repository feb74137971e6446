"""round_values: a cast and its way back, bit for bit those of the reference operator."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import every_16_bits, random_bits, same_floats, specials
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import dequantize_tensor, quantize_scaled

pytest.importorskip("triton")
from fp8fx.kernels.cast import Rounding
from fp8fx.kernels.round_values import round_values

RNG, KEY = torch.tensor([5, 6, 7]), 0x81234567


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return specials(torch.randn(shape) * 40).to(dtype)


def wanted(x: Tensor, format: str, scale: Tensor | None, rounding: str, overflow: str) -> Tensor:
    bits = random_bits(x.shape, RNG, KEY) if rounding == "stochastic" else None
    codes = quantize_scaled(x, formats.get(format), scale, "tensor", rounding, overflow, bits)
    return dequantize_tensor(codes, scale, format, "tensor", x.dtype)


@pytest.mark.parametrize("shape", [(3, 4096), (2, 5, 64), (7, 33), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Under a scale bfloat16 values are rounded once more, which the interpreter does by truncation: powers of two then."""
    x = values(shape, dtype)
    for format, (rounding, overflow) in itertools.product(
        ("e4m3fn", "e5m2"), (("nearest_even", "saturate"), ("nearest_even", "nonfinite"), ("stochastic", "nonfinite"))
    ):
        how = Rounding(rounding, overflow, RNG.to(device), KEY)
        for form in ("none", "given", "current"):
            record = torch.zeros((), device=device)
            scale = torch.tensor(0.125 if dtype == torch.bfloat16 else 0.37) if form == "given" else None
            there = None if scale is None else scale.to(device)
            current = {"current": form == "current", "power_of_two": dtype == torch.bfloat16}
            out = round_values(x.to(device), format, there, how, record, **current)
            same_floats(record, numerics.amax(x))
            if form == "current":
                scale = numerics.compute_scale(numerics.amax(x), format, dtype == torch.bfloat16)
            assert out.dtype == dtype
            torch.testing.assert_close(out.cpu(), wanted(x, format, scale, rounding, overflow), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2"])
def test_all_bfloat16_inputs(device: str, format: str, overflow: str) -> None:
    """Powers of two in the interpreter, as above."""
    x = every_16_bits(torch.bfloat16)
    scales = (None, 0.125) if device == "cpu" else (None, 0.125, 0.0123, 2.0**-100, 3e20)
    for rounding, scale in itertools.product(("nearest_even", "stochastic"), scales):
        how, given = Rounding(rounding, overflow, RNG.to(device), KEY), None if scale is None else torch.tensor(scale)
        out = round_values(x.to(device), format, None if given is None else given.to(device), how).cpu()
        expected = wanted(x, format, given, rounding, overflow)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        numbers = ~expected.isnan()
        assert torch.equal(out.signbit()[numbers], expected.signbit()[numbers])


def test_any_strides(device: str) -> None:
    x = torch.randn(6, 40, device=device)
    out = round_values(x.t(), "e5m2")
    assert out.is_contiguous()
    assert torch.equal(out, round_values(x, "e5m2").t())


def test_refusals() -> None:
    x = torch.ones(4, 4)
    with pytest.raises(KernelError, match="e3m4ieee"):
        round_values(x, "e3m4ieee")
    with pytest.raises(KernelError, match="float64"):
        round_values(x.double(), "e5m2")
    with pytest.raises(KernelError, match="one element"):
        round_values(x, "e5m2", torch.ones(2))
    with pytest.raises(KernelError, match="made here too"):
        round_values(x, "e5m2", torch.ones(()), current=True)
