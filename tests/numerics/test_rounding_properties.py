"""Laws of rounding, on inputs that Hypothesis picks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics.oracles import ALL_FORMATS, DETERMINISTIC, assert_same

from fp8fx import formats
from fp8fx.numerics import round_to_format
from fp8fx.numerics.specification import grid

pytestmark = pytest.mark.core

FORMATS = st.sampled_from(ALL_FORMATS)
NUMBERS = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=50)
law = settings(max_examples=100, deadline=None, derandomize=True)


@law
@given(name=FORMATS, rounding=st.sampled_from(DETERMINISTIC), numbers=NUMBERS)
def test_monotone(name: str, rounding: str, numbers: list[float]) -> None:
    y = round_to_format(torch.tensor(sorted(numbers)), name, rounding)
    assert bool((y[1:] >= y[:-1]).all())


@law
@given(name=FORMATS, rounding=st.sampled_from(["nearest_even", "nearest_away", "toward_zero"]), numbers=NUMBERS)
def test_odd(name: str, rounding: str, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    y, z = round_to_format(-x, name, rounding), -round_to_format(x, name, rounding)
    assert torch.equal(y, z)
    if formats.get(name).signed_zero:
        assert_same(y, z, x)


@law
@given(name=FORMATS, numbers=NUMBERS)
def test_up_mirrors_down(name: str, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    assert torch.equal(round_to_format(x, name, "up"), -round_to_format(-x, name, "down"))


@law
@given(name=FORMATS, numbers=NUMBERS)
def test_each_mode_lands_on_its_side_and_on_a_neighbour(name: str, numbers: list[float]) -> None:
    largest = formats.get(name).max
    x = torch.tensor(numbers).clamp(-largest, largest)
    y = {rounding: round_to_format(x, name, rounding) for rounding in DETERMINISTIC}
    assert bool((y["down"] <= x).all())
    assert bool((y["up"] >= x).all())
    assert bool((y["toward_zero"].abs() <= x.abs()).all())
    for rounding in ("nearest_even", "nearest_away"):
        assert torch.equal((y[rounding].double() - x).abs(), torch.minimum(x.double() - y["down"], y["up"].double() - x))


@law
@given(
    name=st.sampled_from([name for name in ALL_FORMATS if formats.get(name).mantissa_bits > 0]),
    rounding=st.sampled_from(DETERMINISTIC),
    fractions=st.lists(st.floats(1.0, 2.0, exclude_max=True, width=32), min_size=1, max_size=20),
    data=st.data(),
)
def test_equivariant_under_powers_of_two(name: str, rounding: str, fractions: list[float], data: st.DataObject) -> None:
    """Away from subnormals and saturation: both x and 2^k x in the binades [emin, emax - 1]."""
    format_ = formats.get(name)
    top = math.floor(math.log2(format_.max)) - 1
    if top < format_.emin:
        return  # a format with one binade of normal numbers
    first, second = (data.draw(st.integers(format_.emin, top)) for _ in range(2))
    x = torch.tensor(fractions)
    scaled = [round_to_format(x * 2.0**exponent, name, rounding) * 2.0**-exponent for exponent in (first, second)]
    assert torch.equal(*scaled)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_grid_values_stay_in_every_mode(name: str) -> None:
    values = grid(formats.get(name))[:-1]
    x = torch.tensor(values + [-value for value in values if value > 0.0])
    bits = torch.randint(0, 2**32, x.shape, generator=torch.Generator().manual_seed(0))
    for rounding in (*DETERMINISTIC, "stochastic"):
        assert_same(round_to_format(x, name, rounding, random_bits=bits), x, x)
