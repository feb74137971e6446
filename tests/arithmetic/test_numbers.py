"""Wide formats and their rounding, against exact fractions and against torch's own casts."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.arithmetic import number
from fp8fx.arithmetic.definition import round_number
from fp8fx.arithmetic.numbers import MODES, rounder
from fp8fx.errors import FormatError


def hard(name: str) -> Tensor:
    """Values of the format, their midpoints and their neighbours, of every binade's ends; what overflows, zeros, inf and NaN."""
    f = number(name)
    generator = torch.Generator().manual_seed(1)
    exponents = sorted({*range(f.emin - f.mantissa_bits - 2, f.emin + 3), -1, 0, 1, *range(f.bias - 1, min(f.bias + 2, 127))})
    found = []
    for e in exponents:
        step = math.ldexp(1.0, max(e, f.emin) - f.mantissa_bits)
        ks = [0, 1, 2, 2**f.mantissa_bits - 1, *torch.randint(0, 2**f.mantissa_bits, (3,), generator=generator).tolist()]
        found += [math.ldexp(1.0, e) + (k + part) * step for k in ks for part in (0.0, 0.25, 0.5, 0.75)]
    x = torch.tensor([*found, f.max, 0.0], dtype=torch.float64).float()
    x = torch.cat([x, x.view(torch.int32).add(1).view(torch.float32), x.view(torch.int32).sub(1).clamp(min=0).view(torch.float32)])
    return torch.cat([x, -x, torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38])])


NAMES = ("float16", "bfloat16", "e5m6", "e8m13", "e4m11", "e7m4", "e2m9", "e4m3fn", "e5m2", "e3m4fn", "e6m1", "e8m1")


@pytest.mark.parametrize(("name", "overflow"), list(itertools.product(NAMES, ("saturate", "nonfinite"))))
def test_rounding_is_the_definition(name: str, overflow: str) -> None:
    x = hard(name)
    for mode in MODES:
        y = rounder(number(name), mode, overflow)(x)
        exact = [round_number(Fraction(v) if math.isfinite(v) else v, number(name), mode, overflow) for v in x.tolist()]
        expected = torch.tensor([float(v) for v in exact], dtype=torch.float64).float()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_casts_agree(dtype: torch.dtype) -> None:
    x = hard(str(dtype).removeprefix("torch."))
    under_a_tracer = [torch.compile(lambda t: rounder(number(dtype))(t), backend="eager")(x), rounder(number(dtype))(x)]
    for y in under_a_tracer:
        torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_names() -> None:
    assert number("fp16") is number("float16") is number("e5m10") is number(torch.float16)
    assert number("bf16") is number("e8m7")
    assert (number("e5m10").max, number("bfloat16").max) == (65504.0, torch.finfo(torch.bfloat16).max)
    assert number("float32").max == torch.finfo(torch.float32).max
    assert number("e4m3fn") is formats.get("e4m3fn")
    assert number(formats.get("e5m2")) is formats.get("e5m2")


@pytest.mark.parametrize("name", ["float8", "e9m3", "e5m40", "flaot16", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(FormatError, match="unknown number format"):
        number(name)
