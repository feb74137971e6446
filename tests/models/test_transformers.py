from __future__ import annotations

from typing import Any

import pytest
import torch
from coverage_meter import CoverageMeter
from models.common import check_untouched
from models.graphs import check_graphs
from models.measure import Measured, check, measure
from models.zoo import ZOO, build

import fp8fx

NAMES = [name for name, entry in ZOO.items() if entry.family == "transformers"]
ALARM = 17.0  # dB: an output below it means that something is wrong with a transformer, not with FP8


FAMILIES = {"llama", "qwen3", "mixtral", "gpt2", "bert", "t5", "vit", "whisper"}


def test_all_eight_families_are_there() -> None:
    assert {name.split("-")[0] for name in NAMES} == FAMILIES


@pytest.fixture(scope="module", params=NAMES)
def measured(request: pytest.FixtureRequest) -> Measured:
    return measure(request.param, "hybrid", seeds=range(3))


def test_hybrid_is_as_accurate_as_the_oracle(measured: Measured) -> None:
    check(measured)
    assert measured.share == 1.0
    assert measured.output > ALARM


def test_no_graph_breaks_and_nothing_is_compiled_again(measured: Measured) -> None:
    check_graphs(measured.case, measured.fast, measured.graphs)


@pytest.mark.parametrize("name", ["llama-eager", "gpt2-eager", "bert-eager", "mixtral-sdpa"])
def test_direct_is_as_accurate_as_the_oracle(name: str) -> None:
    found = measure(name, "direct", seeds=range(1))
    check(found)
    scores = [row for row in found.plan.fp8 if "softmax" in row.reason and row.op == "matmul"]
    assert len(scores) == (2 if name.endswith("eager") else 0)  # one per layer: its output goes to the softmax as it is


@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-eager", "bert-sdpa"])
def test_models_are_untouched(name: str) -> None:
    check_untouched(name)


@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-sdpa"])
def test_fused_attention_stays_in_high_precision_and_is_listed_apart(name: str) -> None:
    case = build(name)
    plan = fp8fx.plan(case.model, "hybrid", example_inputs=case.inputs)
    attention = [row for row in plan.rows if row.op == "attention"]
    assert [row.decision for row in attention] == ["high_precision"] * 2
    assert plan.attention_flops > 0
    assert plan.fp8_flops_share == 1.0
    assert [row.name for row in plan.exempt] == ["lm_head"]


@pytest.mark.parametrize("name", ["llama-sdpa", "gpt2-eager"])
def test_generate_runs_the_compiled_forward(name: str) -> None:
    case = build(name)
    fast: Any = fp8fx.compile(case.model.eval(), "hybrid")
    prompt = case.inputs["input_ids"][:, :4]
    with CoverageMeter() as meter, torch.no_grad():
        out = fast.generate(
            prompt, max_new_tokens=3, do_sample=False, use_cache=False, attention_mask=torch.ones_like(prompt), pad_token_id=0
        )
        wanted = prompt
        for _ in range(3):
            wanted = torch.cat([wanted, fast(input_ids=wanted).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, wanted)
    assert meter.forward.on_grid > 0
