"""cancel: no tensor is quantized twice, and nothing is dequantized that nobody reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes.models import Chain, Shared, together
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn

from fp8fx.passes.contract import Skip

CHAIN_RULE = "quantize(dequantize(q)) = q"


@pytest.fixture(scope="module")
def shared() -> Trace:
    return together("shared", "hybrid")


@pytest.fixture(scope="module")
def chain() -> Trace:
    return together("chain", "direct")


def test_cancel_golden_shared_input(shared: Trace) -> None:
    shared.check_golden("cancel_shared", "cancel")


def test_cancel_golden_chain(chain: Trace) -> None:
    chain.check_golden("cancel_chain", "cancel")


def test_cancel_golden_through_shapes() -> None:
    together("chain through shapes", "direct").check_golden("cancel_shapes", "cancel")


def test_cancel_modified_true(shared: Trace) -> None:
    assert shared.result("cancel").modified


def test_cancel_modified_false() -> None:
    assert not Trace(nn.Sequential(nn.Linear(8, 8)), "hybrid", randn(2, 8)).result("cancel").modified


@pytest.mark.parametrize("name", ["shared", "chain", "chain through shapes", "chain read twice", "attention"])
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_cancel_is_idempotent(name: str, recipe: str) -> None:
    together(name, recipe).assert_idempotent("cancel")


def test_shared_input_is_quantized_once(shared: Trace) -> None:
    counts = [shared.ops(stage)["fp8fx.quantize"] for stage in ("insert_qdq", "cancel")]
    assert counts == [6, 4]  # three weights, and x once instead of three times


def test_shared_input_is_quantized_once_per_spec() -> None:
    recipe = {"extends": "hybrid", "rules": [{"match": "v", "input": {"format": "e5m2"}}]}
    assert Trace(seeded(Shared), recipe, randn(3, 8)).ops("cancel")["fp8fx.quantize"] == 5


def test_shared_input_is_quantized_once_with_random_bits_too() -> None:
    """All readers name the first site as the producer, so that they draw the same bits."""
    recipe = {"extends": "hybrid", "defaults": {"input": {"rounding": "stochastic"}}}
    assert Trace(seeded(Shared), recipe, randn(3, 8)).ops("cancel")["fp8fx.quantize"] == 4


def test_rows_are_shared_per_contraction() -> None:
    recipe = {"extends": "hybrid", "defaults": {"input": {"granularity": "row"}}}
    trace = Trace(seeded(Shared), recipe, randn(3, 8))
    assert trace.ops("insert_qdq")["fp8fx.quantize"] == 9
    assert trace.ops("cancel")["fp8fx.quantize"] == 5  # x for the output GEMMs, x for the weight gradients, three weights


def test_chained_linears_pass_codes(chain: Trace) -> None:
    assert chain.ops("insert_qdq")["fp8fx.quantize"] == 6
    assert chain.ops("cancel")["fp8fx.quantize"] == 5  # two weights, x, and each output
    assert chain.ops("insert_qdq")["fp8fx.dequantize"] == 2
    assert chain.ops("cancel")["fp8fx.dequantize"] == 1  # the model's own output
    graph = chain.graph("cancel").graph
    first, second = graph.find_nodes(op="call_function", target=torch.ops.fp8fx.linear.default)
    codes = second.args[3][0]
    assert codes.args[0].target is torch.ops.fp8fx.quantize.default
    assert codes.args[0].args[0] is first


def test_codes_pass_through_shape_operations() -> None:
    trace = together("chain through shapes", "direct")
    assert trace.ops("cancel")["fp8fx.dequantize"] == 1
    assert trace.ops("cancel")["view"] == 2  # of the codes, and of the anchor


def test_a_dequantized_tensor_that_is_read_stays() -> None:
    assert together("chain read twice", "direct").ops("cancel")["fp8fx.dequantize"] == 2


# -- refusals -----------------------------------------------------------------------------------------------------------------


def chained(first: dict[str, Any], second: dict[str, Any]) -> Trace:
    recipe = {"extends": "direct", "rules": [{"match": "first", "output": first}, {"match": "second", "input": second}]}
    return Trace(seeded(Chain), recipe, randn(3, 8))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"format": "e4m3fn"}, {"format": "e5m2"}),
        ({"scaling": "current"}, {"format": "e5m2"}),
        ({"format": "e5m2"}, {"scaling": "current"}),
        ({"format": "e5m2"}, {"rounding": "stochastic"}),
        ({"overflow": "nonfinite"}, {"overflow": "saturate"}),
    ],
    ids=["formats", "scaled", "scaled again", "random", "overflow"],
)
def test_unequal_quantizations_stay_with_a_reason(first: dict[str, Any], second: dict[str, Any]) -> None:
    trace = chained(first, second)
    skips = [skip for skip in trace.skips("cancel") if skip.rule == CHAIN_RULE]
    assert len(skips) == 1
    assert isinstance(skips[0], Skip)
    assert "do not give equal codes" in skips[0].reason
    assert trace.ops("cancel")["fp8fx.quantize"] == 6
    assert any(CHAIN_RULE in text for text in trace.plan.skips)


def test_overflow_is_not_cancelled_away() -> None:
    """An inf of the first layer's output is the largest number to a second layer that saturates."""

    class Big(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.0

    recipe = {"extends": "direct", "rules": [{"match": "first", "output": {"overflow": "nonfinite"}}]}
    model = seeded(Big)
    trace = Trace(model, recipe, randn(3, 8) * 1e6)
    assert torch.isfinite(trace.fast(randn(3, 8) * 1e6)).all()


def test_a_half_model_keeps_formats_wider_than_half() -> None:
    """e6m1 reaches 2^32: what half cannot hold becomes inf on the way, so codes must not be passed on."""
    roles = {"input": {"format": "e6m1"}, "output": {"format": "e6m1"}}
    trace = Trace(seeded(Chain).half(), {"extends": "direct", "defaults": roles}, randn(3, 8, dtype=torch.float16))
    assert trace.ops("cancel")["fp8fx.quantize"] == 6
