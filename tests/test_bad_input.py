"""Values and sizes that break things: each case gets a clear error or a stated fallback, and the model passed in is never changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bad_input import Product, Weight, net, rows, untouched
from torch import nn

import fp8fx


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_nonfinite_inputs_stay_in_their_rows(recipe: str) -> None:
    """NaN stays NaN; inf saturates to the format's largest value, as `overflow: saturate` says; neither moves the scale."""
    model, x = net(), rows()
    clean = fp8fx.compile(model, recipe)(x)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    with untouched(model, rows()):
        y = fp8fx.compile(model, recipe)(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    if recipe == "direct":  # no scales: row 2 does not know of the others
        assert torch.equal(y[2], clean[2])
    else:
        assert y[2].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_stay_in_their_outputs(value: float) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    with untouched(model, rows()[:0]):
        y = fp8fx.compile(model, "hybrid")(rows())
    assert y[:, 1].isnan().all() if value != value else y[:, 1].isfinite().all()
    assert y[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "none"])
@pytest.mark.parametrize("first", [0, 3])
def test_empty_batch_forward_and_backward(recipe: str, first: int) -> None:
    model = net()
    with untouched(model, rows()):
        fast = fp8fx.compile(model, recipe)
        fast(rows(first))
        y = fast(rows(0))
        y.sum().backward()
    assert y.shape == (0, 4)
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("granularity", ["row", [2, 4]])
def test_empty_batch_with_finer_scales(granularity: Any) -> None:
    recipe = {"extends": "hybrid", "defaults": {role: {"granularity": granularity} for role in ("input", "weight", "grad_output")}}
    fast = fp8fx.compile(net(), recipe)
    fast(rows(0)).sum().backward()
    assert fast[0].weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize(("n", "k"), [(4, 0), (0, 8)])
def test_zero_sizes(recipe: str, n: int, k: int) -> None:
    model = Weight(n, k)
    x = torch.zeros(3, k, requires_grad=True)
    with untouched(model, x):
        y = fp8fx.compile(model, recipe)(x)
        y.sum().backward()
    assert y.shape == (3, n)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert model.weight.grad is not None
    assert model.weight.grad.shape == (n, k)


def test_zero_sizes_of_matmul_and_convolution() -> None:
    assert torch.equal(fp8fx.compile(Product())(torch.ones(3, 0), torch.ones(0, 5)), torch.zeros(3, 5))
    conv = fp8fx.compile(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    y = conv(torch.zeros(0, 3, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 4, 8, 8)
    assert conv[0].weight.grad.count_nonzero() == 0
    assert fp8fx.compile(nn.Sequential(nn.Embedding(5, 4)))(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


def test_integer_operands_stay_as_they_are_with_a_reason() -> None:
    a, b = torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (4, 5))
    fast = fp8fx.compile(Product())
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs in FP8"):
        assert torch.equal(fast(a, b), a @ b)
    row = fp8fx.plan(fast).rows[0]
    assert row.decision == "high_precision"
    assert row.reason == "operands are int64, int64, not floating point"


def test_integer_input_of_a_linear_fails_as_in_torch() -> None:
    model, x = net(), torch.ones(3, 8, dtype=torch.int64)
    with untouched(model, rows()), pytest.raises(RuntimeError, match="same dtype"):
        fp8fx.compile(model)(x)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_models_of_other_dtypes_keep_them(dtype: torch.dtype, recipe: str) -> None:
    model, x = net().to(dtype), rows().to(dtype)
    with untouched(model, x):
        fast = fp8fx.compile(model, recipe)
        y = fast(x)
        y.sum().backward()
    assert y.dtype is dtype
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    assert len(fast.plan().fp8) == 2  # type: ignore[operator]
    reference = fp8fx.compile(net().to(dtype).float(), recipe)(x.float())  # the same weights and inputs, in fp32
    torch.testing.assert_close(y.float(), reference, rtol=0.15, atol=0.15)
