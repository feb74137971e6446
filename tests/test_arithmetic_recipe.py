"""A recipe with an arithmetic, from capture to gradients: sites run it, passes keep its bits, plans show it, what cannot says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate.stages import assert_same_bits, run_stages
from torch import Tensor, nn

import fp8fx
from fp8fx import formats
from fp8fx.arithmetic import matmul, register
from fp8fx.numerics import quantize_tensor
from fp8fx.numerics.encoding import decode
from fp8fx.spec import TensorSpec

register("recipe_codes", torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
E4M3, E5M2 = "e4m3fn/current/tensor/nearest_even/saturate", "e5m2/current/tensor/nearest_even/nonfinite"


def recipe(arithmetic: Any, **keys: Any) -> dict[str, Any]:
    return {"extends": "hybrid", "defaults": {"arithmetic": arithmetic, **keys}}


def codes(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    q, scale, _ = quantize_tensor(x, TensorSpec.parse(spec))
    return decode(q, formats.get(spec.split("/")[0])), scale


@pytest.mark.parametrize("gradients", ["exact", "same"])
def test_a_linear_layer(gradients: str) -> None:
    """y = product of the codes under the arithmetic, times the scales; gradients likewise if it says so."""
    torch.manual_seed(0)
    keys = {"products": "e5m4", "accumulate": {"chunk": 8, "inner": "float16"}, "shift": -12, "gradients": gradients}
    text = "products=e5m4/accumulate=float16/chunk=8/shift=-12"
    fast = fp8fx.compile(nn.Linear(24, 5), recipe(keys))
    x, grad = torch.randn(7, 24, requires_grad=True), torch.randn(7, 5)
    y = fast(x)
    y.backward(grad)
    (xq, xs), (wq, ws), (gq, gs) = codes(x, E4M3), codes(fast.weight, E4M3), codes(grad, E5M2)
    assert torch.equal(y, matmul(xq, wq.mT, text) * (xs * ws) + fast.bias)
    assert not torch.equal(y, (xq @ wq.mT) * (xs * ws) + fast.bias)
    used = text if gradients == "same" else "exact"
    torch.testing.assert_close(x.grad, matmul(gq, wq, used) * (gs * ws), rtol=1e-6, atol=0)
    torch.testing.assert_close(fast.weight.grad, matmul(gq.mT, xq, used) * (gs * xs), rtol=1e-6, atol=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.nn.functional.gelu(self.up(x)))
        return torch.softmax(h @ h.mT, -1) @ h


@pytest.mark.parametrize(
    "keys",
    [
        {"accumulate": "hopper_fast", "gradients": "same"},
        {"multiplier": "mitchell", "products": "e5m6", "shift": -3},
        {"products": "e8m3", "accumulate": "bfloat16", "rounding": "stochastic", "gradients": "same"},
    ],
)
def test_passes_keep_its_bits(keys: dict[str, Any]) -> None:
    """After insert_qdq the numbers are final: a fused mlp is the two layers, products of activations keep the arithmetic."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4, 16)
    fast = fp8fx.compile(model, recipe(keys))
    fast(x).square().sum().backward()
    assert "mlp(" in fp8fx.listing(fast.graph("fuse"))
    wanted = fp8fx.listing(fast.graph("insert_qdq"), full=True)
    assert wanted.count("accumulate=" + fast.plan().rows[0].spec.accumulate[0]) == 4
    assert_same_bits(run_stages(model, recipe(keys), (x,)))


def test_the_plan_shows_it() -> None:
    plan = fp8fx.plan(nn.Sequential(nn.Linear(8, 8)), recipe({"multiplier": "mitchell"}), example_inputs=torch.ones(2, 8))
    assert "e4m3fn x e4m3fn, grad e5m2, arithmetic multiplier=mitchell" in str(plan)
    assert '"arithmetic": "multiplier=mitchell"' in plan.to_json()
    assert not any("accumulate" in note for note in plan.notes)


def test_the_plan_warns_where_products_of_codes_overflow() -> None:
    def reason(**keys: Any) -> str:
        return fp8fx.plan(nn.Linear(8, 8), recipe(keys), example_inputs=torch.ones(2, 8)).rows[0].reason

    said = reason(products="e5m10", accumulate="float16")
    assert "products of e4m3fn and e4m3fn codes reach 200704, and products: float16 ends at 65504; shift: -2 is the largest" in said
    assert "products of e4m3fn and e4m3fn codes reach 100352, and accumulate: float16 ends at 65504" in reason(accumulate="fp16", shift=-1)
    assert "overflow" not in reason(products="e5m10", accumulate="float16", shift=-2)
    assert "overflow" not in reason(products="e5m10", overflow="saturate") + reason(products="e5m10", rounding="toward_zero")
    assert "overflow" not in reason(accumulate="hopper_fast") + reason(multiplier="mitchell") + reason(products="e8m7")
    with_gradients = reason(products="e5m10", shift=-6, gradients="same")
    assert "products of e5m2 and e4m3fn codes reach 401408, and products: float16 ends at 65504; shift: -9 is" in with_gradients
    assert "shift: -13 is" in reason(products="e3m4fn")


@pytest.mark.parametrize(
    "layer",
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
        (nn.Conv1d(3, 5, 3, dilation=2), (2, 3, 12)),
        (nn.Conv2d(2, 3, (1, 3), padding="same"), (1, 2, 5, 6)),
    ],
)
def test_a_convolution_is_a_product_of_unfolded_images(layer: tuple[nn.Module, tuple[int, ...]]) -> None:
    """In float16 with exact sums of few terms the result is torch's own, rounded; with Mitchell's products it differs."""
    module, shape = layer
    torch.manual_seed(0)
    x = torch.randn(shape)
    plain = fp8fx.compile(module, "hybrid")(x)
    fine = fp8fx.compile(module, recipe({"accumulate": "e8m20"}))
    y = fine(x)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    coarse = fp8fx.compile(module, recipe({"multiplier": "mitchell"}))(x).detach()
    assert 0.0 < float((coarse - plain.detach()).norm() / plain.detach().norm()) < 0.2
    module.zero_grad()


def reasons(module: nn.Module, x: Tensor, arithmetic: Any) -> list[str]:
    return [row.reason for row in fp8fx.plan(module, recipe(arithmetic), example_inputs=x).of("high_precision")]


def test_what_it_does_not_reach() -> None:
    image = torch.randn(1, 2, 6, 6)
    assert reasons(nn.ConvTranspose2d(2, 2, 3), image, {"multiplier": "mitchell"}) == [
        "conv_transpose2d has no form for an arithmetic of its own"
    ]
    assert reasons(nn.Conv2d(2, 2, 3), image, {"multiplier": "mitchell", "gradients": "same"}) == [
        "a convolution's gradients are ordinary ones (arithmetic: gradients: exact)"
    ]
    assert reasons(nn.Linear(4, 4), torch.ones(2, 4), {"multiplier": "recipe_codes"}) == []
    assert reasons(nn.Linear(4, 4), torch.ones(2, 4), {"multiplier": "recipe_codes", "gradients": "same"}) == [
        "a table over codes needs every operand in one format of 8 bits; here they are e4m3fn, e5m2"
    ]
    register("codes_of_e5m2", torch.ones(256, 256), format="e5m2")
    assert reasons(nn.Linear(4, 4), torch.ones(2, 4), {"multiplier": "codes_of_e5m2"}) == [
        "table codes_of_e5m2 is one over the codes of e5m2; here the operands are e4m3fn"
    ]
    embedding = fp8fx.plan(nn.Embedding(4, 8), recipe({"multiplier": "mitchell"}), example_inputs=torch.zeros(2, dtype=torch.int64))
    assert "arithmetic" not in embedding.rows[0].formats


def test_blocks_sum_apart() -> None:
    """Scales per block multiply partial sums: each block is a product of its own under the arithmetic."""
    torch.manual_seed(0)
    block = {"input": {"granularity": [1, 8]}, "weight": {"granularity": [8, 8]}, "grad_output": {"granularity": [1, 8]}}
    module, x = nn.Linear(16, 8, bias=False), torch.randn(4, 16)
    y = fp8fx.compile(module, recipe({"accumulate": "hopper_fast"}, **block))(x)
    plain = fp8fx.compile(module, {"extends": "hybrid", "defaults": block})(x)
    assert 0.0 < float((y - plain).detach().abs().max()) < 0.02
