"""lower: quantized weights become further inputs, made by the runtime."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from passes.models import SINGLE, TOGETHER, Call, together
from passes.trace import Trace, randn, seeded
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fp8fx
from fp8fx import pipeline
from fp8fx.capture.graph import tensor
from fp8fx.clone import runtime_of
from fp8fx.graph_call import GraphCall
from fp8fx.ops import act_linear
from fp8fx.passes.lower import WEIGHTS, WeightInput
from fp8fx.state import quantize_weight


def weights(trace: Trace) -> list[WeightInput]:
    found: list[WeightInput] = trace.graph("lower").meta[WEIGHTS]
    return found


@pytest.fixture(scope="module")
def feed() -> Trace:
    return together("feed gelu", {"extends": "hybrid"})  # its own: one test changes its weights


def test_lower_golden(feed: Trace) -> None:
    feed.check_golden("lower", "lower")


def test_lower_golden_delayed() -> None:
    """The amax of a weight comes in with its codes, and goes out with the others."""
    together("feed gelu", "delayed").check_golden("lower_delayed", "lower")


def test_lower_modified_true(feed: Trace) -> None:
    assert feed.result("lower").modified


def test_lower_modified_false_without_weights() -> None:
    assert not together("scores", "hybrid").result("lower").modified


@pytest.mark.parametrize("name", ["feed gelu", "shared", "chain", "scores"])
@pytest.mark.parametrize("recipe", ["hybrid", "direct", "delayed"])
def test_lower_is_idempotent(name: str, recipe: str) -> None:
    together(name, recipe).assert_idempotent("lower")


def test_quantized_weights_are_inputs_in_order(feed: Trace) -> None:
    made = weights(feed)
    assert [w.parameter for w in made] == ["up.weight", "down.weight"]
    names = [node.name for node in feed.graph("lower").graph.find_nodes(op="placeholder")]
    further = [f"fp8_weight_{i}_{suffix}" for i in range(2) for suffix in ("q", "scale")]
    assert names[-4:] == further
    assert feed.ops("lower")["fp8fx.quantize"] == 0


@pytest.mark.parametrize("name", ["addmm with a weight", "linear", "conv2d", "embedding"])
def test_the_weight_input_says_how_to_quantize(name: str) -> None:
    make, inputs = SINGLE[name]
    trace = Trace(make(), "hybrid", *inputs())
    (made,) = weights(trace)
    weight = dict(trace.model.named_parameters())[made.parameter]
    q, scale, _ = quantize_weight(weight, made)
    viewed = weight.t() if name.startswith("addmm") else weight
    assert q.shape == viewed.shape
    error = (q.float() * scale - viewed).abs().max()
    assert error <= weight.abs().max() * 2**-4


def test_both_axes_of_a_weight_with_row_scales() -> None:
    recipe = {"extends": "hybrid", "defaults": {"weight": {"granularity": "row"}}}
    made = weights(together("chain", recipe))
    assert [(w.parameter, w.dims) for w in made] == [
        ("first.weight", (-1,)), ("first.weight", (0,)), ("second.weight", (-1,)), ("second.weight", (0,)),
    ]  # fmt: skip


# -- what stays in the graph ------------------------------------------------------------------------------------------------------


def test_stochastic_weights_stay_in_the_graph() -> None:
    """Their random bits belong to the call, so a weight that is kept between calls would be another one."""
    recipe = {"extends": "hybrid", "defaults": {"weight": {"rounding": "stochastic"}}}
    trace = together("chain", recipe)
    assert weights(trace) == []
    assert trace.ops("lower")["fp8fx.quantize"] == 4


def test_activations_stay_in_the_graph() -> None:
    trace = Trace(seeded(Call, torch.matmul, (4, 8)), "hybrid", randn(8, 6))
    assert [w.parameter for w in weights(trace)] == ["parts.0"]
    assert trace.ops("lower")["fp8fx.quantize"] == 1


class Computed(nn.Module):
    """A weight that is computed on the way is quantized where it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm())


def test_computed_weights_stay_in_the_graph() -> None:
    trace = Trace(seeded(Computed), "hybrid", randn(4, 8))
    assert weights(trace) == []
    assert trace.ops("lower")["fp8fx.quantize"] == 2


# -- the weight cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "kept"), [("none", 0), ("step", 2)])
def test_weight_cache_in_training(cache: str, kept: int) -> None:
    trace = together("feed gelu", {"extends": "hybrid", "defaults": {"weight_cache": cache}})
    assert [w.cache for w in weights(trace)] == [cache] * 2
    trace.fast(*trace.inputs)
    assert len(runtime_of(trace.fast).weights) == kept


def test_weights_are_kept_in_evaluation_and_follow_their_parameter(feed: Trace) -> None:
    fast = feed.fast
    fast.eval()
    cache = runtime_of(fast).weights
    cache.clear()
    first = fast(*feed.inputs)
    assert len(cache) == 2
    with torch.no_grad():
        feed.model.down.weight.mul_(2.0)  # type: ignore[operator,union-attr]
        feed.model.down.bias.mul_(2.0)  # type: ignore[operator,union-attr]
    assert torch.equal(fast(*feed.inputs), first * 2)
    fast.train()


def on_both(trace: Trace, recipe: Any, inside: bool) -> tuple[fx.Graph, list[list[Tensor]], list[Tensor]]:
    """The graph for kernels; and, as the CPU's graph and this one give them, output and gradients, and what is measured."""
    runtime = runtime_of(trace.fast)
    found, measured = [], []
    kept = fp8fx.Recipe.load(recipe)
    for changes in ({}, {"device": "cuda", "weights_inside": inside, "recipe": kept}):
        module = pipeline.run(trace.record.captured, dataclasses.replace(trace.record.context, **changes)).module
        trace.model.zero_grad()
        runtime.stream.call = 0
        runtime.scaling.amax.fill_(-1.0)
        y = GraphCall(runtime, module)(*trace.values)[0]
        y.square().sum().backward()
        runtime._fold()
        found.append([y, *(p.grad.clone() for p in trace.model.parameters() if p.grad is not None)])
        measured.append(runtime.scaling.amax.clone())
    return module.graph, found, measured


def same_on_kernels(trace: Trace, recipe: Any, inside: bool) -> str:
    """The graph that a GPU gets, run on the reference: outputs, gradients and what is measured are those of the CPU's, bit for bit."""
    base, changes = (recipe["extends"], recipe["defaults"]) if isinstance(recipe, dict) else (recipe, {})
    kept = {"extends": base, "defaults": {**changes, "when_not_faster": "emulate"}}
    graph, found, measured = on_both(trace, kept, inside)
    assert len(found[0]) > 2
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(*measured)
    text = str(graph)
    assert "fp8fx.cast" in text
    assert "columns=yes" in text
    assert ("fp8_weight" in text) != inside
    assert "fp8_meter" not in text
    assert (", output=e5m2" in text) == (base == "direct")  # the products round it
    assert "fp8fx.dequantize" not in text
    assert "fp8fx.quantize" not in text
    assert ("fp8_records" in text) == (base == "delayed")
    return text


@pytest.mark.parametrize("inside", [True, False], ids=["weights inside", "weights outside"])
@pytest.mark.parametrize("recipe", ["hybrid", "delayed", "direct", "rowwise", "blockwise"])
@pytest.mark.parametrize("name", ["feed gelu", "gated silu", "gated gelu", "shared", "chain"])
def test_the_graph_for_kernels_has_the_same_numbers(name: str, recipe: str, inside: bool) -> None:
    text = same_on_kernels(together(name, recipe), recipe, inside)
    one_scale = {"hybrid", "delayed", "direct"}
    assert ("fp8fx.act_linear" in text) == (name not in ("shared", "chain") and recipe in one_scale)


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "du after dh"])
@pytest.mark.parametrize("recipe", ["hybrid", "delayed", "rowwise"])
@pytest.mark.parametrize("name", ["feed gelu", "gated silu"])
def test_activation_inputs_kept_in_fp8(name: str, recipe: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the activation in where their scales are one per tensor; elsewhere it stays an operator of its own."""
    monkeypatch.setattr(act_linear, "APART", 0 if apart else act_linear.APART)
    kept = {"extends": recipe, "defaults": {"save_activation_inputs": "fp8"}}
    text = same_on_kernels(together(name, kept), kept, True)
    assert ("save_activation_inputs=fp8" in text) == (recipe != "rowwise")
    assert ("fp8fx.act_linear" in text) == (recipe != "rowwise")
    assert ("fp8fx.act.default" in text) == (recipe == "rowwise")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["feed gelu", "gated silu"])
def test_symbolic_sizes(name: str, kept: bool) -> None:
    recipe: Any = {"extends": "hybrid", "defaults": {"save_activation_inputs": "fp8"}} if kept else "hybrid"
    make, inputs = TOGETHER[name]
    trace = Trace(make(), recipe, *inputs(), dynamic=True)
    made = [tensor(node) for node in trace.record.captured.module.graph.nodes]
    assert any(isinstance(size, torch.SymInt) for value in made if value is not None for size in value.shape)
    assert "fp8fx.act_linear" in same_on_kernels(trace, recipe, True)


class CastsOfWeights(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.fp8fx.cast.default, torch.ops.fp8fx.cast_current.default) and args[4] == "weight"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["hybrid", "delayed", "rowwise", "blockwise"])
@pytest.mark.parametrize(("name", "weights", "again"), [("gated silu", 3, 3), ("chain", 2, 1)])
def test_weight_transposes_kept(name: str, weights: int, again: int, recipe: str) -> None:
    """A weight is cast once in a step, in both layouts, and not again for its layer's input gradient; the numbers stay."""
    for keep, inside, casts in (("recompute", True, weights + again), ("keep", True, weights), ("keep", False, again)):
        made = {"extends": recipe, "defaults": {"weight_transpose": keep, "when_not_faster": "emulate"}}
        trace = together(name, made)
        with CastsOfWeights() as counted:
            same_on_kernels(trace, made, inside)
        assert counted.count == casts
    skips = pipeline.run(trace.record.captured, dataclasses.replace(trace.record.context, device="cuda")).skips
    assert [skip.rule for skip in skips if "made in backward" in skip.reason] == ["weight_transpose: keep"] * again


@pytest.mark.parametrize("recipe", ["hybrid", "delayed"])
def test_du_after_dh(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act_linear, "APART", 0)
    same_on_kernels(together("gated silu", recipe), recipe, True)


class Tied(nn.Module):
    """Two layers of one weight; the second is called twice, once behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)) * 2.0) + self.second(x)


@pytest.mark.parametrize("inside", [True, False], ids=["weights inside", "weights outside"])
@pytest.mark.parametrize("recipe", ["hybrid", "direct", "rowwise"])
def test_a_shared_weight_that_is_rounded_stochastically_has_one_set_of_bits(recipe: str, inside: bool) -> None:
    """The second layer's backward reads the codes of forward, whose bits are named after the first, and makes none of its own."""
    kept: dict[str, Any] = {"extends": recipe, "defaults": {"when_not_faster": "emulate", "weight": {"rounding": "stochastic"}}}
    trace = Trace(seeded(Tied), kept, randn(3, 8))
    graph, found, _ = on_both(trace, kept, inside)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    layers = graph.find_nodes(op="call_function", target=torch.ops.fp8fx.linear.default)
    assert [len(layer.args[4]) for layer in layers if layer.args[8] == "second"] == [4, 4]
