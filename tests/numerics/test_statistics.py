"""What scales are made from: each statistic against its definition in plain Python, the same for every order, layout and grouping."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.numerics import compute_e8m0_scale, dequantize_tensor, quantize_tensor
from fp8fx.numerics.specification import round_value
from fp8fx.numerics.statistics import FRACTIONS, grouped, mean, percentile
from fp8fx.spec import TensorSpec

SPECIALS = (math.nan, math.inf, -math.inf)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_specials() -> Tensor:
    x = normal(7, 45) * torch.logspace(-3, 3, 45)
    x[0, :3] = torch.tensor(SPECIALS)
    x[3] = math.nan
    x[5] = 0.0
    return x


def by_hand(x: Tensor, granularity: object) -> list[list[float]]:
    """The finite |x| under each scale, in the order of the scales."""
    rows, columns = x.shape
    if granularity == "tensor":
        found = [x.reshape(-1).tolist()]
    elif granularity == "row":
        found = x.tolist()
    else:
        r, c = granularity  # type: ignore[misc]
        found = [x[i : i + r, j : j + c].reshape(-1).tolist() for i, j in itertools.product(range(0, rows, r), range(0, columns, c))]
    return [[abs(v) for v in group if math.isfinite(v)] for group in found]


GRANULARITIES = ["tensor", "row", (1, 32), (4, 16), (8, 64)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mean_is_the_exact_mean(granularity: object) -> None:
    x = with_specials()
    got = mean(grouped(x, granularity)).reshape(-1).tolist()  # type: ignore[arg-type]
    for value, group in zip(got, by_hand(x, granularity), strict=True):
        exact = sum(map(Fraction, group), Fraction(0)) / max(len(group), 1)
        assert abs(Fraction(value) - exact) <= exact * Fraction(1, 2**24) + Fraction(max(group, default=0.0)) / 2**40


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("percent", [0.1, 50.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_least_value_that_enough_do_not_exceed(granularity: object, percent: float) -> None:
    x = with_specials()
    got = percentile(grouped(x, granularity), percent).reshape(-1).tolist()  # type: ignore[arg-type]
    for value, group in zip(got, by_hand(x, granularity), strict=True):
        enough = [v for v in sorted(group) if sum(w <= v for w in group) >= len(group) * (percent / 100.0)]
        assert value == (enough[0] if enough else 0.0)


@pytest.mark.parametrize("statistic", ["mean", "percentile", "mse"])
def test_the_order_of_the_elements_does_not_matter(statistic: str) -> None:
    """What makes devices agree: their sums add in different orders."""
    x = normal(5000) * torch.logspace(-6, 6, 5000)
    spec = TensorSpec(format="int8", statistic=statistic)
    scale = quantize_tensor(x, spec)[1]
    for seed in range(3):
        order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(quantize_tensor(x[order], spec)[1], scale)


def quadratic_error(values: list[float], largest: float, format: str) -> float:
    f = formats.get(format)
    scale = torch.tensor(largest) / f.max
    inverse = 1.0 / scale
    return sum((round_value(float(torch.tensor(v) * inverse), f) * float(scale) - v) ** 2 for v in values)


@pytest.mark.parametrize("format", ["int4", "int8", "e2m1", "e4m3fn", "e3m4b2.5", "ue3m4"])
@pytest.mark.parametrize("granularity", ["tensor", (1, 32)])
def test_mse_is_the_least_of_all_candidates(format: str, granularity: object) -> None:
    x = normal(2, 45, seed=3)
    spec = TensorSpec(format=format, granularity=granularity, statistic="mse")  # type: ignore[arg-type]
    scale = quantize_tensor(x, spec)[1].reshape(-1).tolist()
    signed = [g.reshape(-1).tolist() for g in ([x] if granularity == "tensor" else [x[:1, :32], x[:1, 32:], x[1:, :32], x[1:, 32:]])]
    for got, group in zip(scale, signed, strict=True):
        errors = [quadratic_error(group, f * max(map(abs, group)), format) for f in FRACTIONS]
        assert quadratic_error(group, got * formats.get(format).max, format) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("format", ["e4m3b6.5", "e4m3fn", "e2m1", "int4", "int8"])
@pytest.mark.parametrize("keys", [{"scale_format": "e8m0"}, {"power_of_two": True}])
def test_mse_finds_the_best_power_of_two(format: str, keys: dict[str, object]) -> None:
    """Of all from 2^-5 of the scale that amax makes to twice it, and of those two and four times the one at which nothing saturates."""
    for seed in range(6):
        x = normal(1, 60, seed=seed) * 2.0 ** (seed / 6)
        scale = quantize_tensor(x, TensorSpec(format=format, statistic="mse", **keys))[1].item()  # type: ignore[arg-type]
        usual = quantize_tensor(x, TensorSpec(format=format, **keys))[1].item()  # type: ignore[arg-type]
        assert math.frexp(scale)[0] == 0.5
        largest = formats.get(format).max

        def error(scale: float, x: Tensor = x, largest: float = largest) -> float:
            values = [round_value(v / scale, formats.get(format)) * scale - v for v in x.reshape(-1).tolist()]
            return sum(v * v for v in values)

        assert error(scale) <= min(error(usual * 2.0**k) for k in range(-5, 4)) * (1 + 1e-5)


def test_mse_under_e8m0_reaches_the_scale_at_which_nothing_saturates() -> None:
    """e4m3b6.5 ends at 1.33 * 2^8: values near the next power of two are cut by the scale of OCP MX."""
    x = torch.full((1, 64), 1.9)
    x[0, 32:] = normal(32, seed=2) * 0.1

    def error(**keys: object) -> float:
        spec = TensorSpec(format="e4m3b6.5", **keys)  # type: ignore[arg-type]
        codes, scale, _ = quantize_tensor(x, spec)
        return float((dequantize_tensor(codes, scale, "e4m3b6.5") - x).square().sum())

    assert error(statistic="mse", scale_format="e8m0") == error(statistic="mse", power_of_two=True) < 0.1 * error(scale_format="e8m0")


def test_mse_does_better_than_max_where_the_largest_values_are_rare() -> None:
    x = normal(20000, seed=1)

    def error(**keys: object) -> float:
        spec = TensorSpec(format="int4", **keys)  # type: ignore[arg-type]
        codes, scale, _ = quantize_tensor(x, spec)
        return float((dequantize_tensor(codes, scale, "int4") - x).square().mean())

    assert error(statistic="mse") < 0.7 * error()


@pytest.mark.parametrize("value", [1e-3, 1.0, 1.75, 1.9, 447.0, 448.0, 449.0, 6.0, 3.0e38])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "int8"])
def test_the_scale_of_ocp_mx(value: float, format: str) -> None:
    exponent = (
        math.floor(math.log2(float(torch.tensor(value)))) - {"e4m3fn": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "e2m1": 2, "int8": 6}[format]
    )
    assert compute_e8m0_scale(torch.tensor(value), format).item() == 2.0**exponent


def test_mx_blocks_by_hand() -> None:
    """[0.3 ... ] with amax 3.1: scale 2^(1 - 2) = 1/2, so 3.1 becomes 6 * 1/2; the second group is cut, the third all zero."""
    x = torch.zeros(1, 72)
    x[0, :3] = torch.tensor([3.1, -0.3, 0.8])
    x[0, 32:34] = torch.tensor([0.01, 0.0])
    codes, scale, _ = quantize_tensor(x, TensorSpec(format="e2m1", granularity=(1, 32), scale_format="e8m0"))
    values = dequantize_tensor(codes, scale, "e2m1", (1, 32))
    assert scale[0, :2].tolist() == [0.5, 2.0**-9]
    assert values[0, :3].tolist() == [3.0, -0.25, 0.75]
    assert values[0, 32:34].tolist() == [pytest.approx(0.01, rel=0.2), 0.0]
    assert values[0, 64:].count_nonzero() == 0


@pytest.mark.parametrize("format", ["e2m1", "int8", "ue2m1"])
@pytest.mark.parametrize("scaling", ["none", "current", "fixed", "delayed"])
def test_a_format_without_nan_carries_it_in_the_scale(format: str, scaling: str) -> None:
    x = normal(2, 64).abs()
    x[0, 40] = math.nan
    spec = TensorSpec(format=format, scaling=scaling, max_value=3.0 if scaling == "fixed" else None)
    blocks = dataclasses.replace(spec, granularity=(1, 32)) if scaling == "current" else spec
    given = torch.tensor(0.25) if scaling == "delayed" else None
    codes, scale, _ = quantize_tensor(x, blocks, scale=given)
    values = dequantize_tensor(codes, scale, format, blocks.granularity)
    assert values[0, 32:].isnan().all()
    assert scaling != "current" or not (values[0, :32].isnan().any() or values[1].isnan().any())


def test_fixed_scales_and_clips() -> None:
    x = normal(4, 8) * 100
    codes, scale, amax = quantize_tensor(x, TensorSpec(format="e4m3fn", scaling="fixed", max_value=7.0))
    assert scale.item() == 7.0 / 448.0
    assert amax == x.abs().max()
    assert dequantize_tensor(codes, scale).abs().max() == 7.0
    half = quantize_tensor(x, TensorSpec(format="e4m3fn", clip=0.5))[1]
    assert half == quantize_tensor(x, TensorSpec(format="e4m3fn"))[1] / 2
    with pytest.raises(ModelError, match="max_value"):
        quantize_tensor(x, TensorSpec(format="e4m3fn", scaling="fixed"))


@pytest.mark.parametrize("statistic", ["mean", "percentile", "mse"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("granularity", ["tensor", "row", (1, 4)])
def test_empty_and_small_tensors(statistic: str, shape: tuple[int, ...], granularity: object) -> None:
    if len(shape) < 2 and granularity == (1, 4):
        return
    x = torch.full(shape, 2.0)
    codes, scale, amax = quantize_tensor(x, TensorSpec(format="int8", statistic=statistic, granularity=granularity))  # type: ignore[arg-type]
    assert codes.shape == x.shape
    assert scale.shape == amax.shape
    assert bool((scale > 0).all())


def test_specs_round_trip_as_text() -> None:
    choices = {
        "format": ["int8", "e4m3b6.5", "ue4m4"],
        "granularity": ["tensor", "row", (1, 32)],
        "statistic": ["max", "mean", "percentile", "mse"],
        "percentile": [99.9, 99.99],
        "clip": [1.0, 0.1],
        "scale_format": ["float32", "e8m0"],
        "power_of_two": [False, True],
        "max_value": [None, 0.1],
    }
    for values in itertools.product(*choices.values()):
        spec = TensorSpec(**dict(zip(choices, values, strict=True)))
        assert TensorSpec.parse(spec.text) == spec
