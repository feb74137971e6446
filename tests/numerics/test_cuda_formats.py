"""Emulation on a GPU has the bits of the CPU: every format and rounding over all bfloat16, every kind of scale, every operator."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics.test_format_sweep import BFLOAT16, BITS, FRACTIONAL, MODES, SIGNED, UNSIGNED, policies
from torch import Tensor

import fp8fx
from fp8fx.numerics import decode, encode, quantize_tensor, round_to_format
from fp8fx.numerics.tensor import dequantize_tensor
from fp8fx.spec import TensorSpec

pytestmark = pytest.mark.gpu
SCALES = [
    "current/tensor",
    "current/row",
    "current/1x32",
    "current/16x8",
    "current/1x32/e8m0",
    "current/tensor/mean",
    "current/row/percentile",
    "current/1x16/mse",
    "current/1x16/mse/e8m0",
    "fixed/tensor",
    "none/tensor",
]
FORMATS = ("e4m3fn", "e5m2", "e3m4fn", "e2m3", "e2m1", "int8", "ue4m4", "e4m3b6.5")


def same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for which NaN it is."""
    assert actual.dtype == expected.dtype
    if expected.element_size() == 1:
        assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
        return
    actual, nan = actual.cpu(), expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED, *FRACTIONAL])
def test_every_bfloat16(name: str) -> None:
    there, bits = BFLOAT16.cuda(), BITS.cuda()
    for rounding, overflow in itertools.product(MODES, policies(name)):
        random = (BITS, bits) if rounding == "stochastic" else (None, None)
        wanted = round_to_format(BFLOAT16, name, rounding, overflow, random[0])
        found = round_to_format(there, name, rounding, overflow, random[1])
        same(found, wanted)
        same(encode(found, name), encode(wanted, name))
        same(decode(encode(found, name), name), decode(encode(wanted, name), name))


def spec_of(format: str, scale: str, rounding: str) -> TensorSpec:
    scaling, granularity, *more = scale.split("/")
    extra = {"statistic": more[0]} if more and more[0] != "e8m0" else {}
    extra |= {"scale_format": "e8m0"} if "e8m0" in more else {}
    block = tuple(int(side) for side in granularity.split("x")) if "x" in granularity else granularity
    value = {"max_value": 3.5} if scaling == "fixed" else {}
    return TensorSpec(format=format, scaling=scaling, granularity=block, rounding=rounding, **extra, **value)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("format", FORMATS)
def test_scales_and_codes(format: str, scale: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype, rounding in itertools.product((torch.bfloat16, torch.float32), ("nearest_even", "stochastic")):
        x = (torch.randn(3, 50, 70, generator=generator) * torch.randn(50, 1, generator=generator).exp()).to(dtype)
        x[0, 3, 5], x[1, 7, 9] = float("inf"), float("nan")
        bits = torch.randint(0, 2**32, x.shape, generator=generator) if rounding == "stochastic" else None
        spec = spec_of(format, scale, rounding)
        wanted = quantize_tensor(x, spec, random_bits=bits)
        found = quantize_tensor(x.cuda(), spec, random_bits=None if bits is None else bits.cuda())
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
        same(dequantize_tensor(*found[:2], format, spec.granularity), dequantize_tensor(*wanted[:2], format, spec.granularity))


@pytest.mark.parametrize("format", ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "int8", "e3m4fn"])
def test_a_compiled_model(format: str) -> None:
    """Sums on a GPU differ in order, and a code at a boundary with them; the codes of one and the same input do not (above)."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32)), torch.randn(16, 64)
    recipe = {"extends": "emulation-hybrid", "defaults": {"input": {"format": format}, "weight": {"format": format}}}
    wanted = fp8fx.compile(model, recipe, inner="eager")(x).detach()
    found = fp8fx.compile(model.cuda(), recipe, inner="eager")(x.cuda()).detach().cpu()
    assert 20 * torch.log10(wanted.norm() / (found - wanted).norm()) > 40
