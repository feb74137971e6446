"""On a GPU *annotate* leaves in high precision what FP8 would not make faster, and says why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from passes.models import together
from torch import Tensor, nn

import fp8fx
from fp8fx import pipeline
from fp8fx.compile import _compiled
from fp8fx.options import Options
from fp8fx.passes.contract import SiteDecision, decision
from fp8fx.passes.products import products


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
    assert all(
        re.search(r"by (cuBLASLt|fp8fx's kernels)$", made.reason) for made in decisions if made.op == "linear" and made.mode == "fp8"
    )


def test_formats_that_only_an_emulation_has_are_kept_on_a_gpu() -> None:
    decisions = on_gpu({"extends": "hybrid", "defaults": {"input": {"format": "e3m4ieee"}}})
    kept = [made for made in decisions if made.mode == "fp8"]
    assert kept
    assert all("; emulated: e3m4ieee is no format of this hardware" in made.reason for made in kept if made.op == "linear")


def decided(model: nn.Module, *batches: Tensor, recipe: Any = "hybrid", autocast: bool = False, **gpu: Any) -> list[list[SiteDecision]]:
    """What each graph would decide on an H200; a batch of a new size makes a graph."""
    torch._dynamo.reset()  # what another test captured would make sizes symbols
    fast = fp8fx.clone.runtime_of(compiled := _compiled(model, fp8fx.Recipe.load(recipe), Options(plan_only=True)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for x in batches:
            compiled(x)
    there = {"device": "cuda", "device_name": "NVIDIA H200", "capability": (9, 0), **gpu}
    contexts = [dataclasses.replace(record.context, **there) for record in fast.graphs]
    runs = [pipeline.run(record.captured, context, "annotate") for record, context in zip(fast.graphs, contexts, strict=True)]
    return [[site.decision for site in run.annotated] for run in runs]


def layers(width: int, hidden: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden, device=device), nn.ReLU(), nn.Linear(hidden, width, device=device)).to(dtype)


def test_a_convolution_says_that_it_is_emulated() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 36, 10))
    ((conv, _),) = decided(model, torch.randn(8, 64, 8, 8))
    assert (conv.mode, conv.reason) == ("fp8", "defaults (hybrid); emulated: convolutions have no FP8 kernel yet")


def test_sizes_that_change_are_judged_at_those_that_were_seen() -> None:
    first, second = decided(layers(256, 256), *(torch.randn(rows, 256).bfloat16() for rows in (16, 24)))
    assert [made.mode for made in first + second] == ["high_precision"] * 4
    first, second = decided(layers(4096, 4096, "meta"), *(torch.empty(m, 4096, device="meta").bfloat16() for m in (8192, 16384)))
    assert [made.mode for made in first + second] == ["fp8"] * 4


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_under_autocast_the_product_is_judged_in_its_own_dtype(cuda_graphs: bool) -> None:
    (made,) = decided(layers(1024, 4096, dtype=torch.float32), torch.randn(1024, 1024), autocast=True, cuda_graphs=cuda_graphs)
    assert [each.mode for each in made] == ["high_precision"] * 2
    assert all("FP8 does not pay here: 0." in each.reason for each in made)


def test_launches_are_named_where_they_decide() -> None:
    meta = {"device": "meta", "dtype": torch.bfloat16}
    (made,) = decided(layers(4096, 4096, "meta"), torch.empty(2048, 4096, **meta))
    assert [each.mode for each in made] == ["high_precision"] * 2
    assert all(
        "1." in each.reason and 'launches take the host longer than that saves: inner_mode="reduce-overhead"' in each.reason
        for each in made
    )
    (made,) = decided(layers(4096, 4096, "meta"), torch.empty(2048, 4096, **meta), cuda_graphs=True)
    assert [each.mode for each in made] == ["fp8"] * 2


@pytest.mark.parametrize("where", [torch.backends, torch.backends.cuda.matmul], ids=["backends", "matmul"])
def test_the_newer_switch_of_tf32(where: Any) -> None:
    """torch raises where the older one is read after it."""
    if not hasattr(where, "fp32_precision"):
        pytest.skip("this torch has no such switch")
    model, x, gains = layers(8192, 8192, "meta", torch.float32), torch.empty(8192, 8192, device="meta"), list[float]()
    matmul = torch.backends.cuda.matmul
    before, of_matmul = where.fp32_precision, matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = "none"  # Dynamo leaves there what the general one was
            where.fp32_precision = precision
            ((made, _),) = decided(model, x, cuda_graphs=True)
            gains.append(float(re.findall(r"([\d.]+) times as fast", made.reason)[0]))
    finally:
        where.fp32_precision, matmul.fp32_precision = before, of_matmul
    assert gains[1] < gains[0] / 2, "over TF32 FP8 gains less than over float32"


@pytest.mark.parametrize(
    ("recipe", "size", "wanted"),
    [
        ("hybrid", (8192, 4096), "products by cuBLASLt"),
        ("delayed", (8192, 4096), "products by cuBLASLt"),
        ("rowwise", (8192, 4096), "products by cuBLASLt"),
        ("blockwise", (8192, 4096), "products by cuBLASLt"),
        ("blockwise", (8190, 4096), "products by fp8fx's kernels"),
        ("direct", (8192, 4096), "products by fp8fx's kernels"),
        ("hybrid", (8190, 4096), "output and grad_input by cuBLASLt, grad_weight by fp8fx's kernels"),
        ("hybrid", (8192, 4100), "products by fp8fx's kernels"),
        ("rowwise", (16, 16384), "output by fp8fx's kernels, grad_input and grad_weight by cuBLASLt"),
    ],
    ids=str,
)
def test_the_plan_says_whose_products_run(recipe: str, size: tuple[int, int], wanted: str, cuda_13: None) -> None:
    m, k = size
    model = nn.Linear(k, k, bias=False, device="meta", dtype=torch.bfloat16)
    ((made,),) = decided(model, torch.empty(m, k, device="meta", dtype=torch.bfloat16), recipe=emulating(recipe), cuda_graphs=True)
    assert made.mode == "fp8"
    assert made.reason.endswith(f"; {wanted}"), made.reason


@pytest.fixture
def cuda_13(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch whose cuBLASLt has products of blocks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    products.cache_clear()
    yield
    products.cache_clear()


def emulating(recipe: str) -> dict[str, Any]:
    return {"extends": recipe, "defaults": {"when_not_faster": "emulate"}}


def test_an_older_cublaslt_has_no_products_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    products.cache_clear()
    ((made,),) = decided(nn.Linear(512, 512).bfloat16(), torch.randn(512, 512).bfloat16(), recipe=emulating("blockwise"))
    products.cache_clear()
    assert made.reason.endswith("; products by fp8fx's kernels")


@pytest.mark.parametrize(("capability", "wanted"), [((9, 0), "output by fp8fx's kernels, "), ((10, 0), "products by cuBLASLt")], ids=str)
def test_few_rows_run_on_ours_on_hopper_only(capability: tuple[int, int], wanted: str) -> None:
    model, x = nn.Linear(512, 512, bias=False).bfloat16(), torch.randn(16, 512).bfloat16()
    ((made,),) = decided(model, x, recipe=emulating("rowwise"), capability=capability)
    assert wanted in made.reason


def test_under_autocast_gradients_and_bias_have_dtypes_of_their_own() -> None:
    """dX and dW of float32 by rows are none of cuBLASLt's, nor is a float32 bias."""
    x = torch.randn(1024, 512)
    for bias, wanted in (
        (False, "output by cuBLASLt, grad_input and grad_weight by fp8fx's kernels"),
        (True, "products by fp8fx's kernels"),
    ):
        ((made,),) = decided(nn.Linear(512, 512, bias=bias), x, recipe=emulating("rowwise"), autocast=True)
        assert made.reason.endswith(f"; {wanted}"), made.reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"save_for_backward": "high_precision"}, "save_for_backward keeps its input in high precision"),
        ({"gemms": {"grad_input": "high_precision", "grad_weight": "high_precision"}}, "not all of its GEMMs are in FP8"),
        ({"input": {"granularity": [128, 1]}}, "no kernel has blocks of 128x1"),
    ],
    ids=str,
)
def test_what_the_reference_runs_is_not_said_to_be_fast(changes: dict[str, Any], why: str) -> None:
    """As *lower* says of it: in high precision it is faster."""
    model, x = nn.Linear(4096, 4096, device="meta").bfloat16(), torch.empty(8192, 4096, device="meta").bfloat16()
    ((made,),) = decided(model, x, recipe={"extends": "hybrid", "defaults": changes}, cuda_graphs=True)
    assert made.mode == "high_precision"
    assert made.reason == f"{why}, and emulating FP8 is slower (when_not_faster: emulate keeps FP8)"
    ((made,),) = decided(model, x, recipe={"extends": "hybrid", "defaults": {**changes, "when_not_faster": "emulate"}})
    assert (made.mode, made.reason) == ("fp8", f"defaults (hybrid); emulated: {why}")


def test_a_size_that_is_not_known_is_not_judged() -> None:
    x = torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    (made,) = decided(layers(4096, 4096, "meta"), x, recipe="rowwise")
    assert [each.mode for each in made] == ["fp8"] * 2
    assert not any("cost model" in each.reason for each in made)


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
