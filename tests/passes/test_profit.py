"""On a GPU *annotate* leaves in high precision what FP8 would not make faster, and says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from passes.models import together

import fp8fx
from fp8fx import pipeline
from fp8fx.options import Options
from fp8fx.passes.contract import SiteDecision, decision


def on_gpu(recipe: dict[str, Any], cuda_graphs: bool = False) -> list[SiteDecision]:
    """The decisions that a graph on a GPU would get for a block whose layers are far too small for FP8."""
    trace = together("attention", "hybrid")
    context = dataclasses.replace(trace.record.context, device="cuda", recipe=fp8fx.Recipe.load(recipe), cuda_graphs=cuda_graphs)
    graph = pipeline.run(trace.record.captured, context, "annotate").module.graph
    return [made for node in graph.nodes if (made := decision(node)) is not None]


def test_small_layers_stay_in_high_precision_on_a_gpu() -> None:
    decisions = on_gpu({"extends": "hybrid"})
    assert {made.mode for made in decisions} == {"high_precision"}
    reasons = {made.op: made.reason for made in decisions}
    assert "FP8 does not pay here" in reasons["linear"]
    assert "times as fast by the cost model (when_not_faster: emulate keeps FP8)" in reasons["linear"]


def test_a_product_without_a_kernel_stays_in_high_precision_on_a_gpu() -> None:
    trace = together("scores", "hybrid")
    context = dataclasses.replace(trace.record.context, device="cuda")
    graph = pipeline.run(trace.record.captured, context, "annotate").module.graph
    decisions = [made for node in graph.nodes if (made := decision(node)) is not None]
    assert decisions
    assert all(made.mode == "high_precision" and "no FP8 kernel" in made.reason for made in decisions)


def test_emulate_keeps_fp8_on_a_gpu() -> None:
    decisions = on_gpu({"extends": "hybrid", "defaults": {"when_not_faster": "emulate"}})
    assert "fp8" in {made.mode for made in decisions}
    assert not any("cost model" in made.reason for made in decisions)


def test_formats_that_only_an_emulation_has_are_kept_on_a_gpu() -> None:
    decisions = on_gpu({"extends": "hybrid", "defaults": {"input": {"format": "e3m4ieee"}}})
    assert "fp8" in {made.mode for made in decisions}


def test_the_cost_model_decides_for_the_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def choose(layers: Any, table: Any, least: float) -> list[bool]:
        seen.extend(layers)
        return [i == 0 for i in range(len(layers))]

    monkeypatch.setattr(fp8fx.costs, "choose", choose)
    decisions = [made for made in on_gpu({"extends": "rowwise"}) if made.op == "linear"]
    assert len(seen) > 1
    assert [made.mode for made in decisions] == ["fp8"] + ["high_precision"] * (len(seen) - 1)
    assert all((layer.granularity, layer.scaling, layer.training) == ("row", "current", True) for layer in seen)


def test_inside_of_cuda_graphs_launches_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[Any] = []

    def choose(layers: Any, table: Any, least: float) -> list[bool]:
        hosts.append(table.host["training"]["fp8"])
        return [True] * len(layers)

    monkeypatch.setattr(fp8fx.costs, "choose", choose)
    for cuda_graphs in (False, True):
        on_gpu({"extends": "hybrid"}, cuda_graphs)
    assert hosts[0] > 0
    assert hosts[1] == 0
    modes = {mode: Options(inner_mode=mode).cuda_graphs for mode in (None, "default", "reduce-overhead", "max-autotune-no-cudagraphs")}
    assert modes == {None: False, "default": False, "reduce-overhead": True, "max-autotune-no-cudagraphs": False}
    assert not Options(inner="eager", inner_mode="reduce-overhead").cuda_graphs


def test_what_passes_know_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    context = together("attention", "hybrid").record.context
    there = context.on(torch.device("cuda", 0), trains=True)
    assert (there.device, there.device_name, there.capability, there.weights_inside) == ("cuda", "NVIDIA H100 80GB HBM3", (9, 0), True)
    assert context.on(torch.device("cpu"), trains=True) == context
