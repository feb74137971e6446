"""amax and the scale rules, against loops and the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.numerics import amax, compute_scale, expand_scale, inverse, mean_magnitude, te_current_scale

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_amax_of_a_tensor_ignores_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0, math.nan], [math.inf, 2.0, -math.inf]], dtype=dtype)
    assert amax(x).item() == 3.0
    assert amax(x).shape == ()
    assert amax(x).dtype == torch.float32
    assert amax(x[1, 2]).item() == 0.0
    assert amax(torch.full((3,), math.nan, dtype=dtype)).item() == 0.0
    assert amax(torch.empty(0, 4, dtype=dtype)).item() == 0.0


def test_an_element_beyond_float32_is_not_finite() -> None:
    assert amax(torch.tensor([1e300, 2.0], dtype=torch.float64)).item() == 2.0


def test_amax_by_row() -> None:
    x = torch.tensor([[1.0, -3.0, math.nan], [math.inf, math.nan, -math.inf]])
    assert amax(x, "row").tolist() == [[3.0], [0.0]]
    assert amax(x, "row", (0,)).tolist() == [[1.0, 3.0, 0.0]]
    assert amax(torch.ones(2, 3, 4), "row", (0, -1)).shape == (1, 3, 1)
    assert amax(torch.ones(2, 0), "row").tolist() == [[0.0], [0.0]]
    assert amax(torch.ones(0, 3), "row").shape == (0, 1)
    assert amax(torch.tensor(-2.0), "row").item() == 2.0


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (3, 5), (128, 128)])
@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (2, 5, 6), (1, 1)])
def test_amax_by_block_equals_a_loop(block: tuple[int, int], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[0] = math.inf
    rows, columns = block
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    expected = [
        [finite[..., i : i + rows, j : j + columns].amax((-2, -1)) for j in range(0, shape[-1], columns)] for i in range(0, shape[-2], rows)
    ]
    got = amax(x, block)
    assert got.shape == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    assert torch.equal(got, torch.stack([torch.stack(row, -1) for row in expected], -2))


def test_blocks_of_empty_and_flat_tensors() -> None:
    assert amax(torch.empty(0, 8), (4, 4)).shape == (0, 2)
    with pytest.raises(ModelError, match="at least two dimensions"):
        amax(torch.ones(4), (1, 4))
    with pytest.raises(ModelError, match="unknown granularity 'column'"):
        amax(torch.ones(4, 4), "column")


def test_current_scale_is_the_definition() -> None:
    largest = torch.tensor([0.0, 1e-20, 1.0, 448.0, 3e38, math.inf, math.nan])
    expected = torch.tensor([1e-12, 1e-12, 1.0, 448.0, 3e38, 1e-12, 1e-12]) / torch.tensor(448.0)
    assert torch.equal(compute_scale(largest, "e4m3fn"), expected)
    assert compute_scale(torch.tensor(0.5), "e5m2", eps=2.0).item() == torch.tensor(2.0 / 57344.0).item()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e7m0fn"])
def test_power_of_two_scale_is_floor_log2_of_the_inverse(name: str) -> None:
    largest = torch.logspace(-12, 38, 997, dtype=torch.float64).float()
    scale = compute_scale(largest, name, power_of_two=True)
    exponents = torch.tensor([math.frexp(value)[1] - 1 for value in (torch.tensor(formats.get(name).max) / largest).tolist()])
    assert torch.equal(scale, torch.tensor([2.0**-exponent for exponent in exponents.clamp(-126, 126).tolist()]))
    usable = exponents.clamp(-126, 126) == exponents
    assert bool(((largest / scale) <= formats.get(name).max)[usable].all()), "floor keeps amax inside the format"


def test_scales_and_their_inverses_are_normal_numbers() -> None:
    for name in ("e4m3fn", "e2m1", "e7m0fn"):
        for power_of_two in (False, True):
            scale = compute_scale(torch.tensor([0.0, 1e-45, 3.4e38]), name, power_of_two, eps=1e-45)
            assert bool((scale >= 2.0**-126).all())
            assert bool(inverse(scale).isfinite().all())


def test_inverse_is_one_division() -> None:
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(inverse(scale), (1.0 / scale.double()).float())


def test_inductor_computes_the_same_scales() -> None:
    x = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 1] = math.nan, math.inf

    def scales(x: Tensor) -> list[Tensor]:
        blocks: list[str | tuple[int, int]] = ["tensor", "row", (16, 16)]
        return [compute_scale(amax(x, block), "e4m3fn", power) for block in blocks for power in (False, True)]

    for got, expected in zip(torch.compile(scales, fullgraph=True, dynamic=False)(x), scales(x), strict=True):
        assert torch.equal(got, expected)


def test_transformer_engine_rule() -> None:
    fmax = torch.tensor(448.0)
    scale = te_current_scale(torch.tensor([0.0, math.inf, 2.0, 1e-44]), "e4m3fn")
    assert scale[:2].tolist() == [1.0, 1.0]
    assert scale[2] == 1.0 / (fmax / 2.0)
    assert scale[3] == 1.0 / torch.tensor(torch.finfo(torch.float32).max)
    assert te_current_scale(torch.tensor(3.0), "e4m3fn", power_of_two=True).item() == 1 / 128


def test_mean_magnitude_per_channel() -> None:
    x = torch.tensor([[1.0, -3.0, 2.0], [math.nan, 4.0, math.inf], [math.nan, math.inf, -math.inf]])
    assert mean_magnitude(x).tolist() == [[2.0], [4.0], [0.0]]
    assert mean_magnitude(x, (0,)).shape == (1, 3)


def test_expand_scale() -> None:
    scale = torch.arange(6.0).reshape(2, 3)
    wide = expand_scale(scale, (2, 4), (3, 10))
    assert wide.shape == (3, 10)
    assert all(wide[i, j] == scale[i // 2, j // 4] for i in range(3) for j in range(10))
    assert expand_scale(scale, "row", (5, 5)) is scale
