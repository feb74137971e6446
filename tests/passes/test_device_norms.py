"""Norms that write FP8 (graphs for kernels that run eagerly): the same numbers, forward and backward.

Bit for bit, but for float32 gradients behind an RMSNorm, which torch computes on a CPU as several operations: autograd adds their gradients
of x to the residual's one by one, where one operator adds their sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes.trace import Trace, randn, seeded
from torch import Tensor, fx, nn

import fp8fx
from fp8fx import pipeline
from fp8fx.clone import runtime_of
from fp8fx.graph_call import GraphCall
from fp8fx.passes.norms import norm_of


class LlamaNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class Block(nn.Module):
    """q, k and v of one norm; a residual; gate and up of another, which reads the sum."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(16), norm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.o(self.q(h).tanh() * self.k(h).tanh() + self.v(h))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": lambda width: nn.RMSNorm(width, eps=1e-5),
    "llama": LlamaNorm,
    "bare": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}


def rewritten(trace: Trace, recipe: str, eager: bool) -> pipeline.Compiled:
    kept = fp8fx.Recipe.load({"extends": recipe, "defaults": {"when_not_faster": "emulate"}})
    changes: dict[str, Any] = {"device": "cuda", "weights_inside": True, "recipe": kept, "eager": eager}
    return pipeline.run(trace.record.captured, dataclasses.replace(trace.record.context, **changes))


def norm_casts(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=torch.ops.fp8fx.norm_cast.default))


CASES = [(kind, recipe, torch.bfloat16) for kind in NORMS for recipe in ("delayed", "direct")]
CASES += [(kind, "hybrid", torch.float32) for kind in ("layer", "rms", "llama")]


@pytest.mark.parametrize(("kind", "recipe", "dtype"), CASES)
def test_the_same_numbers(kind: str, recipe: str, dtype: torch.dtype) -> None:
    model = seeded(Block, NORMS[kind]).to(dtype)
    trace = Trace(model, recipe, randn(2, 6, 16, dtype=dtype).requires_grad_())
    runtime = runtime_of(trace.fast)
    found: list[Any] = []
    measured = []
    for eager in (False, True):
        module = rewritten(trace, recipe, eager).module
        for tensor in (trace.inputs[0], *model.parameters()):
            tensor.grad = None
        runtime.stream.call = 0
        runtime.scaling.amax.fill_(-1.0)
        y = GraphCall(runtime, module)(*trace.values)[0]
        y.backward(randn(2, 6, 16, seed=5, dtype=dtype))
        runtime._fold()
        found.append([y, trace.inputs[0].grad, *(p.grad for p in model.parameters())])
        measured.append(runtime.scaling.amax.clone())
        made = norm_casts(module)
        assert [node.args[1] is not None for node in made] == ([False, True] if eager else [])  # the second adds the residual
        assert ("fp8fx.act_linear" in str(module.graph)) is True
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(*found, strict=True):
        if kind in ("layer", "bare") or dtype == torch.bfloat16:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(*measured)


def test_an_eps_that_is_an_input_of_the_graph() -> None:
    """With dynamic=True numbers that modules hold are symbols too: such a norm is left as it is."""
    trace = Trace(seeded(Block, nn.LayerNorm), "delayed", randn(2, 6, 16), dynamic=True)
    assert not norm_casts(rewritten(trace, "delayed", True).module)


def test_a_graph_for_kernels_can_be_listed() -> None:
    trace = Trace(seeded(Block, nn.LayerNorm), "delayed", randn(2, 6, 16))
    text = fp8fx.listing(rewritten(trace, "delayed", True).module)
    assert "norm1, _, q_norm1, qt_norm1 = norm_cast(x_1, weight=norm1_weight" in text
    assert "norm2, sum_norm2, q_norm2, qt_norm2 = norm_cast(x_1, y_o, " in text
    assert "q_q_weight, *_ = cast(q_weight, 'e4m3fn/delayed/tensor/power_of_two', " in text
    assert "y_q = linear(norm1, q_weight, q_bias, input=[q_norm1, fp8_scales[0], qt_norm1, fp8_scales[0]]" in text
    assert "a_up, q_a_up, qt_a_up = act_linear(norm2, gate_weight, up_weight, " in text


class Read(nn.Module):
    """What keeps a norm, or the sum before it, as it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.fc = how, nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        s = x + r
        h = self.norm(s)
        y = self.fc(h)
        return y + h if self.how == "output" else y + s + s.tanh() if self.how == "sum" else y


@pytest.mark.parametrize(("how", "recipe", "norms", "sums"), [("output", "hybrid", 0, 0), ("sum", "hybrid", 1, 0), ("", "rowwise", 0, 0)])
def test_what_is_read_elsewhere_stays(how: str, recipe: str, norms: int, sums: int) -> None:
    trace = Trace(seeded(Read, how), recipe, randn(4, 16), randn(4, 16, seed=2))
    compiled = rewritten(trace, recipe, True)
    made = norm_casts(compiled.module)
    assert len(made) == norms
    assert sum(node.args[1] is not None for node in made) == sums


def test_near_misses_are_no_norms() -> None:
    def graph(function: Callable[..., Tensor]) -> fx.Node:
        traced = fx.symbolic_trace(function)
        for node in traced.graph.nodes:
            node.meta["val"] = torch.empty(4, 8, dtype=torch.float32)
        return traced.graph.output_node().args[0]  # type: ignore[return-value]

    def norm(x: Tensor, w: Tensor, power: int = 2, dim: int = -1) -> Tensor:
        h = x.to(torch.float32)
        return w * (h * torch.rsqrt(h.pow(power).mean(dim, keepdim=True) + 1e-6)).to(torch.float32)

    found = norm_of(graph(lambda x, w: norm(x, w)))
    assert found is not None
    assert (found.kind, found.eps, found.x.name, found.weight.name, len(found.nodes)) == ("rms_rounded", 1e-6, "x", "w", 8)
    assert norm_of(graph(lambda x, w: norm(x, w, power=3))) is None
    assert norm_of(graph(lambda x, w: norm(x, w, dim=0))) is None
    assert norm_of(graph(lambda x, w: x * w)) is None
    assert norm_of(graph(lambda x, w: torch.layer_norm(x, (4, 8)))) is None
