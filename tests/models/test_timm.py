from __future__ import annotations

from typing import Any

import pytest
import torch
from models.common import check_untouched
from models.graphs import check_graphs
from models.measure import TOLERANCE, Measured, check, measure
from models.zoo import ZOO, build

import fp8fx
from fp8fx.plan import Plan

NAMES = [name for name, entry in ZOO.items() if entry.family == "timm"]


# torch runs this model's fused attention, whose mask is learned, as products in high precision.
UNFUSED = {"beit_base_patch16_224"}


def test_there_are_twenty_models() -> None:
    assert len(NAMES) >= 20


@pytest.fixture(scope="module", params=NAMES)
def measured(request: pytest.FixtureRequest) -> Measured:
    """One seed; three where a gradient is off: a processor's order of sums can put one code on the other side of a boundary, which costs
    one small gradient 0.6 dB with that seed (pvt_v2_b0, docs/log.md)."""
    found = measure(request.param, "hybrid", seeds=range(1))
    return found if found.worst.margin >= -TOLERANCE else measure(request.param, "hybrid", seeds=range(3))


def test_hybrid_is_as_accurate_as_the_oracle(measured: Measured) -> None:
    check(measured)
    assert (measured.share == 1.0) == (measured.name not in UNFUSED)


def test_no_graph_breaks_and_nothing_is_compiled_again(measured: Measured) -> None:
    check_graphs(measured.case, measured.fast, measured.graphs)


def test_direct_is_as_accurate_as_the_oracle() -> None:
    check(measure("resnet18", "direct", seeds=range(1)))


def test_models_are_untouched() -> None:
    check_untouched("resnet18")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_both_front_ends_give_one_plan(name: str) -> None:
    case = build(name)
    state = {key: value.clone() for key, value in case.model.state_dict().items()}
    plans = {capture: fp8fx.plan(case.model, "hybrid", example_inputs=case.inputs, capture=capture) for capture in ("symbolic", "dynamo")}
    assert plans["symbolic"].to_json() == plans["dynamo"].to_json()
    traced = fp8fx.plan(case.model, "hybrid")
    assert decisions(traced) == decisions(plans["dynamo"])
    assert traced.flops == 0  # without inputs there are no shapes
    assert all(torch.equal(state[key], value) for key, value in case.model.state_dict().items())  # in train mode: num_batches_tracked too


def test_a_symbolic_forward_counts_batches() -> None:
    """A write to a buffer belongs to the graph: it happens at every call, and not while tracing."""
    case = build("mobilenetv2_100")
    fast = fp8fx.compile(case.model, "hybrid", capture="symbolic")
    for count in (1, 2):
        case.logits(fast)
        assert case.model.get_buffer("bn1.num_batches_tracked") == count


def decisions(plan: Plan) -> list[tuple[Any, ...]]:
    return [(row.name, row.op, row.decision, row.formats, row.reason) for row in plan.rows]


def test_direct_fuses_the_outputs_that_batch_norm_reads() -> None:
    """Every convolution of a ResNet is read by a batch norm; only the last linear rounds what it hands out."""
    plan = fp8fx.plan(build("resnet18").model, "direct")
    rounded = [row.name for row in plan.fp8 if row.spec is not None and row.spec.output is not None]
    assert rounded == ["fc"]
