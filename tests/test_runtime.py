"""What a compiled model does around its graphs: errors of passes, torch's fused paths, names, notes, and what it keeps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fp8fx
from fp8fx import pipeline
from fp8fx.capture import dynamo
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


# -- the plan -------------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Four layers and a graph break; `late`: behind the last layer too."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x))
        torch._dynamo.graph_break()
        x = self.d(self.c(x))
        if self.late:
            torch._dynamo.graph_break()
        return x + 1


ENDS = {"version": 1, "boundary": {"first": "exempt", "last": "exempt"}}


def test_first_and_last_are_the_models_own(x: torch.Tensor) -> None:
    fast = fp8fx.compile(Broken(), ENDS)
    fast(x)
    with torch.no_grad():
        fast(x)
        fast(x[:3])
    assert decisions(fast) == {"a": "exempt", "b": "fp8", "c": "fp8", "d": "exempt"}
    assert not fast.plan().notes


def test_last_is_noted_where_it_is_not_known(x: torch.Tensor) -> None:
    fast = fp8fx.compile(Broken(late=True), ENDS)
    fast(x)
    assert decisions(fast) == {"a": "exempt", "b": "fp8", "c": "fp8", "d": "fp8"}
    assert [note.split(":")[0] for note in fast.plan().notes] == ["boundary.last was not applied"]


def test_first_and_last_of_blocks_that_break(x: torch.Tensor) -> None:
    fast = fp8fx.compile(nn.Sequential(Broken(), Broken(), nn.Linear(32, 32)), ENDS)
    fast(x)
    exempt = [row.name for row in fast.plan().exempt]
    assert exempt[0] == "0.a"
    assert set(exempt) <= {"0.a", "2"}
    assert exempt == ["0.a", "2"] or fast.plan().notes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.norm(self.emb(i)) @ self.emb.weight.t()


def test_a_tied_table_is_two_rows() -> None:
    recipe = {"version": 1, "rules": [{"match": {"op": "embedding"}, "mode": "exempt"}]}
    plan = fp8fx.plan(Tied(), recipe, example_inputs=torch.arange(10))
    assert [(row.name, row.op, row.decision) for row in plan.rows] == [("emb", "embedding", "exempt"), ("emb", "matmul", "fp8")]
    assert plan["emb"].op == "embedding"
    assert plan.flops == 2 * 10 * 10 * 32
    assert plan.exempt_flops == 0
    assert plan.fp8_flops_share == 1


class Odd(nn.Module):
    """Its forward does not call itself `self`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        y = this.fc(x)
        return y @ y.t() @ x


def test_functional_sites_are_named_after_the_module_whatever_self_is_called(x: torch.Tensor) -> None:
    fast = fp8fx.compile(nn.Sequential(Odd(), Odd(), Odd()))
    fast(x)
    names = [row.name for row in fast.plan().rows]
    assert names == ["0.fc", "0.matmul", "0.matmul_1", "1.fc", "1.matmul", "1.matmul_1", "2.fc", "2.matmul", "2.matmul_1"]


def test_a_pattern_that_another_graph_matches_is_not_noted(x: torch.Tensor) -> None:
    fast = fp8fx.compile(Broken(), exempt=["c", "nosuch.matmul"])
    fast(x)
    assert decisions(fast)["c"] == "exempt"
    assert fast.plan().notes == ["exempt 'nosuch.matmul': matches nothing"]


@pytest.mark.parametrize(
    ("defaults", "note"),
    [
        ({"when_not_faster": "high_precision"}, "when_not_faster: high_precision has no effect"),
        ({"weight_transpose": "keep"}, "weight_transpose: keep has no effect"),
        ({"accumulate": {"output": "precise"}}, "accumulate has no effect"),
        ({"save_for_backward": "high_precision"}, "save_for_backward: high_precision has no effect on conv1d"),
        ({}, ""),
    ],
)
def test_what_has_no_effect_is_noted(defaults: dict[str, object], note: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8))
    notes = fp8fx.plan(model, {"version": 1, "defaults": defaults}, example_inputs=torch.ones(2, 4, 8)).notes
    assert len(notes) == bool(note)
    assert all(text.startswith(note) for text in notes)


# -- mistakes of the user's -----------------------------------------------------------------------------------------------


def test_an_inner_mode_that_is_none_is_refused_at_compile() -> None:
    with pytest.raises(fp8fx.ModelError, match=r"inner_mode='bogus': allowed are .*reduce-overhead"):
        fp8fx.compile(Two(), inner_mode="bogus")
    fp8fx.compile(Two(), inner_mode="reduce-overhead")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "indcutor"}, "inner='indcutor': allowed are .* Did you mean 'inductor'"),
        ({"inner_mode": "max-autotun"}, "Did you mean 'max-autotune'"),
        ({"inner": 3}, "inner=3: allowed are"),
    ],
)
def test_the_backend_checks_its_options_too(x: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(Two(), backend="fp8fx", options=options)(x)


@pytest.mark.parametrize("patterns", [5, [5], True])
def test_exempt_says_what_a_pattern_is(patterns: object) -> None:
    with pytest.raises(fp8fx.RecipeError, match=r"exempt\[0\].*allowed: a pattern such as"):
        fp8fx.compile(Two(), exempt=patterns)


def test_example_inputs_that_do_not_fit(x: torch.Tensor) -> None:
    with pytest.raises(fp8fx.ModelError, match=r"example_inputs do not fit Two.forward.*'?x'?"):
        fp8fx.plan(Two(), example_inputs={"y": x})
    assert len(fp8fx.plan(Two(), example_inputs={"x": x}).fp8) == 2


def test_what_torch_caches_belongs_to_these_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keys a compiled backward by the forward's graph, which names operators only: a later version must not find it."""
    tags: list[str] = []
    real = torch._dynamo.lookup_backend

    def watched(name: str) -> Any:
        if name == "aot_eager":
            tags.append(torch.compiler.config.cache_key_tag)
        return real(name)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", watched)
    for formulas in (dynamo._formulas(), "changed"):
        monkeypatch.setattr(dynamo, "_formulas", lambda formulas=formulas: formulas)
        fp8fx.compile(nn.Linear(4, 4), inner="aot_eager")(torch.ones(2, 4))
    assert tags[0] != tags[1]
    assert len(tags[0]) > 64
    assert tags[1].endswith("changed")
    assert torch.compiler.config.cache_key_tag == ""
