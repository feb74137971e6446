"""Rounding against three references that share nothing: the specification, gfloat and ml_dtypes; eager and through Inductor."""

from __future__ import annotations

import math

import pytest
import torch
from numerics.oracles import (
    ALL_FORMATS,
    DETERMINISTIC,
    GFLOAT_FORMATS,
    ML_DTYPES,
    all_values,
    assert_same,
    decisive,
    gfloat_round,
    ml_dtypes_values,
)
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import FormatError, ModelError
from fp8fx.numerics import round_to_format
from fp8fx.numerics.specification import round_value, round_values

pytestmark = pytest.mark.core

SIXTEEN = (torch.bfloat16, torch.float16)


def overflows(name: str) -> tuple[str, ...]:
    return ("saturate",) if formats.get(name).nan == "none" else ("saturate", "nonfinite")


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_all_16_bit_inputs_agree_with_gfloat(name: str, rounding: str) -> None:
    for dtype in SIXTEEN:
        x = all_values(dtype)
        for overflow in overflows(name):
            assert_same(round_to_format(x, name, rounding, overflow), gfloat_round(x, name, rounding, overflow), x)


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if formats.get(name).nan != "none"])
def test_all_16_bit_inputs_agree_with_ml_dtypes(name: str) -> None:
    for dtype in SIXTEEN:
        x = all_values(dtype)
        assert_same(round_to_format(x, name, overflow="nonfinite"), ml_dtypes_values(x, name), x)


@pytest.mark.parametrize("name", ["e2m3", "e3m2", "e2m1"])
def test_formats_without_specials_agree_with_ml_dtypes(name: str) -> None:
    for dtype in SIXTEEN:
        x = all_values(dtype)
        x = x[~x.isnan()]  # ml_dtypes has no NaN to give
        assert_same(round_to_format(x, name), ml_dtypes_values(x, name), x)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_midpoints_and_neighbours_agree_with_the_specification(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = decisive(name, dtype)
        for rounding in DETERMINISTIC:
            for overflow in overflows(name):
                expected = torch.tensor(round_values(x.tolist(), name, rounding, overflow))
                assert_same(round_to_format(x, name, rounding, overflow), expected, x)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m5", "e7m0fn"])
def test_the_specification_agrees_with_gfloat_everywhere(name: str) -> None:
    x = torch.cat([all_values(torch.bfloat16)[::7].double(), decisive(name)])  # exact fractions are slow
    for rounding in DETERMINISTIC:
        for overflow in overflows(name):
            assert_same(torch.tensor(round_values(x.tolist(), name, rounding, overflow)), gfloat_round(x, name, rounding, overflow), x)


def test_float64_is_rounded_once() -> None:
    """Just above a midpoint, by less than float32 can hold: through float32 it would become the tie, and go down to even."""
    x = torch.tensor([1.0625 + 2.0**-40, 1.0625 - 2.0**-40, 1.1875 - 2.0**-40], dtype=torch.float64)
    assert round_to_format(x, "e4m3fn").tolist() == [1.125, 1.0, 1.125]
    assert round_to_format(x.float(), "e4m3fn").tolist() == [1.0, 1.0, 1.25]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m5", "e5m2fnuz", "e7m0fn"])
def test_stochastic_agrees_with_the_specification(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64):
        x = decisive(name, dtype)
        for low, high in ((0, 1), (2**32 - 1, 2**32), (0, 2**32)):
            bits = torch.randint(low, high, x.shape, generator=generator)
            for overflow in overflows(name):
                pairs = zip(x.tolist(), bits.tolist(), strict=True)
                expected = torch.tensor([round_value(v, name, "stochastic", overflow, b) for v, b in pairs])
                assert_same(round_to_format(x, name, "stochastic", overflow, bits), expected, x)


def test_random_bits_may_be_int32() -> None:
    bits = torch.arange(2**32 - 500, 2**32 + 500) & 0xFFFFFFFF
    x = torch.full((1000,), 1.0 + 2.0**-7)
    assert torch.equal(
        round_to_format(x, "e4m3fn", "stochastic", random_bits=bits.to(torch.int32)),
        round_to_format(x, "e4m3fn", "stochastic", random_bits=bits),
    )


NEAREST = ("e4m3fn", "e5m2", "e4m3ieee", "e3m4ieee", "e3m4fn", "e2m5", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m1", "e7m0fn")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    parts = [all_values(dtype).float() for dtype in SIXTEEN]
    return torch.cat(parts + [decisive(name, torch.float32) for name in NEAREST])


def test_inductor_gives_the_bits_of_the_oracle_for_every_format(inputs: Tensor) -> None:
    compiled = torch.compile(lambda x: [round_to_format(x, name) for name in NEAREST], fullgraph=True, dynamic=False)
    for name, got in zip(NEAREST, compiled(inputs), strict=True):
        assert_same(got, gfloat_round(inputs, name, "nearest_even", "saturate"), inputs)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2fnuz"])
def test_inductor_gives_the_bits_of_the_oracle_for_every_mode(inputs: Tensor, name: str) -> None:
    variants = [(rounding, overflow) for rounding in DETERMINISTIC for overflow in overflows(name)]
    compiled = torch.compile(lambda x: [round_to_format(x, name, *variant) for variant in variants], fullgraph=True, dynamic=False)
    for variant, got in zip(variants, compiled(inputs), strict=True):
        assert_same(got, gfloat_round(inputs, name, *variant), inputs)


def test_inductor_gives_the_eager_bits_for_stochastic_and_float64(inputs: Tensor) -> None:
    bits = torch.randint(0, 2**32, inputs.shape, generator=torch.Generator().manual_seed(2))
    doubles = decisive("e4m3fn")

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return round_to_format(x, "e5m2", "stochastic", random_bits=bits), round_to_format(y, "e4m3fn")

    got = torch.compile(run, fullgraph=True, dynamic=False)(inputs, doubles)
    expected = run(inputs, doubles)
    assert_same(got[0], expected[0], inputs)
    assert_same(got[1], expected[1], doubles)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_any_float_dtype_and_shape(dtype: torch.dtype) -> None:
    for x in (torch.tensor(1.3), torch.empty(0, 3), torch.randn(6, 4).t()):
        y = round_to_format(x.to(dtype), "e4m3fn")
        assert y.dtype == torch.float32
        assert y.shape == x.shape
        assert torch.equal(y, round_to_format(x.to(dtype).contiguous().double(), "e4m3fn"))


def test_nan_inf_and_zero() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0])
    assert str(round_to_format(x, "e5m2").tolist()) == "[nan, 57344.0, -57344.0, -0.0, 0.0]"
    assert str(round_to_format(x, "e5m2", overflow="nonfinite").tolist()) == "[nan, inf, -inf, -0.0, 0.0]"
    assert str(round_to_format(x, "e4m3fn", overflow="nonfinite").tolist()) == "[nan, nan, nan, -0.0, 0.0]"
    assert str(round_to_format(x, "e4m3fnuz").tolist()) == "[nan, 240.0, -240.0, 0.0, 0.0]"
    assert str(round_to_format(x, "e2m1").tolist()) == "[nan, 6.0, -6.0, -0.0, 0.0]"


def test_wrong_arguments_are_refused_with_what_is_allowed() -> None:
    x = torch.zeros(2)
    with pytest.raises(FormatError, match="Did you mean 'nearest_even'"):
        round_to_format(x, "e5m2", "nearest_evn")
    with pytest.raises(FormatError, match="saturate or nonfinite"):
        round_to_format(x, "e5m2", overflow="clip")
    with pytest.raises(FormatError, match="random_bits"):
        round_to_format(x, "e5m2", "stochastic")
    with pytest.raises(FormatError, match="neither inf nor NaN"):
        round_to_format(x, "e2m1", overflow="nonfinite")
    with pytest.raises(ModelError, match=r"torch.int64 tensor .* \.float"):
        round_to_format(torch.zeros(2, dtype=torch.int64), "e5m2")
