"""The public functions, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx import functional as F
from fp8fx.errors import FormatError, ModelError
from fp8fx.numerics import round_to_format

pytestmark = pytest.mark.core

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["e4m3fn", "e2m5"])
def test_fake_quantize_is_dequantize_of_quantize(name: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for x in (matrix, matrix.t(), matrix[::2, ::3], matrix[0, 0], matrix[:0]):
        scale = F.compute_scale(x, name)
        for s in (None, scale, 0.25):
            y = F.fake_quantize(x, name, s)
            assert y.dtype == dtype
            assert y.shape == x.shape
            assert torch.equal(y, F.dequantize(F.quantize(x, name, s), s, name, dtype=dtype))


def test_granularities() -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]
    for block in ("tensor", "row", (2, 4)):
        scale = F.compute_scale(x, "e4m3fn", block)
        y = F.fake_quantize(x, "e4m3fn", scale, granularity=block)
        assert torch.equal(y, F.dequantize(F.quantize(x, "e4m3fn", scale, granularity=block), scale, granularity=block))
        assert (y - x).norm() < 0.04 * x.norm()
    assert F.compute_scale(x, "e4m3fn", "row", dims=(0,)).shape == (1, 10)


def test_gradient_is_straight_through_and_zero_where_saturated() -> None:
    x = torch.tensor([1.1, -3.3, 448.0, 449.0, -1e6, math.inf, math.nan, 0.0], requires_grad=True)
    F.fake_quantize(x, "e4m3fn").backward(torch.arange(1.0, 9.0))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 8.0]
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    F.fake_quantize(x, "e4m3fn", 2.0 / 448).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_changes_no_bit_of_the_value(dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, 0.0, -1e-7, 1.3, -500.0, math.inf, -math.inf, math.nan]).to(dtype)
    assert str(F.fake_quantize(x.clone().requires_grad_(), "e4m3fn").tolist()) == str(F.fake_quantize(x, "e4m3fn").tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_with_gradient_equals_eager(dtype: torch.dtype) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = F.compute_scale(x, "e5m2")
        nearest = F.fake_quantize(x, "e5m2", scale * 2)
        other = F.fake_quantize(x, "e5m2", scale, rounding="up", overflow="saturate")
        return nearest, other, F.dequantize(F.quantize(x, "e2m5", scale * 57344), scale, "e2m5")

    base = torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    results = []
    for function in (run, compiled):
        x = base.clone().requires_grad_()
        out = function(x)
        (out[0].sum() + 2 * out[1].sum()).backward()
        results.append((*out, x.grad))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_compiled_for_dynamic_shapes() -> None:
    compiled = torch.compile(lambda x: F.fake_quantize(x, "e4m3fn", F.compute_scale(x, "e4m3fn")), fullgraph=True, dynamic=True)
    for count in (5, 64, 1000):
        x = torch.randn(count, generator=torch.Generator().manual_seed(count))
        assert torch.equal(compiled(x), F.fake_quantize(x, "e4m3fn", F.compute_scale(x, "e4m3fn")))


def test_stochastic_draws_its_seed_from_the_default_generator() -> None:
    x = torch.full((1000,), 1.1)
    torch.manual_seed(0)
    first, second = (F.fake_quantize(x, "e5m2", None, "stochastic") for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(F.fake_quantize(x, "e5m2", None, "stochastic"), first)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {1.0, 1.25}
    assert torch.equal(
        F.fake_quantize(x, "e5m2", None, "stochastic", seed=4, step=2),
        F.quantize(x, "e5m2", None, rounding="stochastic", seed=4, step=2).float(),
    )
    assert not torch.equal(*(F.fake_quantize(x, "e5m2", None, "stochastic", seed=4, step=step) for step in (2, 3)))


def test_stochastic_without_a_seed_compiles() -> None:
    x = torch.full((1000,), 1.1)
    compiled = torch.compile(lambda x: F.fake_quantize(x, "e5m2", None, "stochastic"), fullgraph=True)
    torch.manual_seed(0)
    first = compiled(x)
    second = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), first)
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {1.0, 1.25}


def test_a_format_that_only_the_compiler_meets() -> None:
    """Dynamo reads the name, builds the format and bakes it in."""
    x = torch.tensor([0.3, 1.9])
    compiled = torch.compile(lambda x: F.fake_quantize(x, "e3m1fn"), fullgraph=True, backend="eager")
    assert compiled(x).tolist() == [0.25, 2.0]


def test_overflow_policies() -> None:
    x = torch.tensor([500.0, -math.inf, math.nan])
    assert str(F.fake_quantize(x, "e4m3fn").tolist()) == "[448.0, -448.0, nan]"
    assert str(F.fake_quantize(x, "e4m3ieee", overflow="nonfinite").tolist()) == "[inf, -inf, nan]"


def test_float64_is_rounded_once_when_unscaled() -> None:
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert F.quantize(x, "e4m3fn").float().item() == 1.125
    assert torch.equal(F.fake_quantize(x, "e4m3fn").float(), round_to_format(x, "e4m3fn"))


def test_what_cannot_be_done_says_so() -> None:
    integers = torch.ones(3, dtype=torch.int32)
    for call in (
        lambda: F.quantize(integers, "e4m3fn"),
        lambda: F.fake_quantize(integers, "e4m3fn", rounding="stochastic"),
        lambda: F.compute_scale(integers, "e4m3fn"),
    ):
        with pytest.raises(ModelError, match=r"torch.int32 tensor"):
            call()
    with pytest.raises(FormatError, match="pass format="):
        F.dequantize(F.quantize(torch.ones(3), "e2m5"), None)
    with pytest.raises(FormatError, match="ambiguous"):
        F.quantize(torch.ones(3), "e4m3")
