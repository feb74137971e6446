"""What a compiled model does around its graphs: errors of passes, torch's fused paths, names, notes, and what it keeps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fp8fx
from fp8fx import pipeline
from fp8fx.clone import base_class, runtime_of


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.fc2 = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc(x)))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 32)


def decisions(fast: nn.Module) -> dict[str, str]:
    return {row.name: row.decision for row in fp8fx.plan(fast).rows}


# -- passes ---------------------------------------------------------------------------------------------------------------


def replace_pass(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(module: object, context: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:-1], ("lower", broken)))


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError("x")])
def test_any_error_of_a_pass_is_a_pass_error(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, error: Exception) -> None:
    replace_pass(monkeypatch, error)
    with pytest.raises(fp8fx.PassError, match="pass lower failed"):
        fp8fx.compile(Two())(x)
    with pytest.warns(fp8fx.FP8Warning, match="Running in high precision"):
        fp8fx.compile(Two(), on_capture_error="eager")(x)


def test_an_error_that_has_a_name_keeps_it(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    replace_pass(monkeypatch, fp8fx.CaptureError("mine"))
    with pytest.raises(fp8fx.CaptureError, match="mine"):
        fp8fx.compile(Two())(x)


# -- torch's fused attention modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "encoder", "attention"])
def test_evaluation_runs_in_fp8_as_training_does(kind: str) -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mha(x, x, x, need_weights=False)[0]

    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    made = {"layer": layer, "encoder": lambda: nn.TransformerEncoder(layer(), 2), "attention": Attention}[kind]()
    fast, x = fp8fx.compile(made), torch.randn(2, 5, 32)
    trained = fast.train()(x)
    fast.eval()
    with torch.no_grad():
        evaluated = fast(x)
        graphs = len(runtime_of(fast).graphs)
        for _ in range(3):
            fast(x)
    assert torch.equal(trained, evaluated)
    assert len(runtime_of(fast).graphs) == graphs
    assert torch.backends.mha.get_fastpath_enabled()
    alone = fp8fx.compile(made.eval())
    with torch.no_grad():
        assert torch.equal(alone(x), trained)
    assert decisions(alone) == decisions(fast)
    assert set(decisions(alone).values()) - {"high_precision"} == {"fp8"}


# -- what a model keeps ---------------------------------------------------------------------------------------------------


def test_subclass_of_the_compiled_class(x: torch.Tensor) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    model = nn.Linear(32, 32)
    fast = fp8fx.compile(model)
    parametrize.register_parametrization(fast, "weight", Double())
    assert base_class(fast) is nn.Linear
    wanted = nn.Linear(32, 32)
    with torch.no_grad():
        wanted.weight.copy_(model.weight * 2)
        wanted.bias.copy_(model.bias)
    assert torch.equal(fast(x), fp8fx.compile(wanted)(x))


def test_monitor_does_not_grow_without_an_optimizer(x: torch.Tensor) -> None:
    fast = fp8fx.compile(Two())
    monitor = runtime_of(fast).monitor
    fast(x).sum().backward()
    (once,) = monitor._sums.values()
    for _ in range(4):
        fast(x).sum().backward()
    (total,) = monitor._sums.values()
    assert once[0].any()
    assert torch.equal(total, 5 * once)


def test_weights_that_are_not_the_models_are_not_kept(x: torch.Tensor) -> None:
    fast = fp8fx.compile(Two()).eval()
    with torch.no_grad():
        fast(x)
        weights = runtime_of(fast).weights
        own = len(weights)
        for _ in range(3):
            others = {name: value.detach() * 2 for name, value in fast.named_parameters()}
            torch.func.functional_call(fast, others, (x,))
            assert len(weights) == own == 2
        assert len(runtime_of(fast).graphs) == 2  # one for weights that are parameters, one for plain tensors
        fast.fc.weight = nn.Parameter(fast.fc.weight * 2)
        fast(x)
        assert len(weights) == 3  # the model passed in still has the old one
        assert len(runtime_of(fast).graphs) == 2


def test_weights_of_dead_tensors_are_dropped(x: torch.Tensor) -> None:
    fast = fp8fx.compile(nn.Sequential(nn.Linear(32, 32))).eval()
    runtime_of(fast).original = None
    with torch.no_grad():
        fast(x)
        fast[0].weight = nn.Parameter(fast[0].weight * 2)
        gc.collect()
        assert len(runtime_of(fast).weights) == 0
