"""Mistakes at the doors: each error names its cause, for fp8fx.compile and for the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from semantics.harness import data, enter, seeded
from semantics.models import Mlp
from torch import nn

import fp8fx


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "hybrid"}, r"RecipeError.*unknown key 'recpie'; allowed are recipe, .*Did you mean 'recipe'\?"),
        ({"fullgraph": True}, r"RecipeError.*unknown key 'fullgraph'; allowed are recipe, exempt, output_fused, inner or inner_mode"),
        ({"recipe": "rowwize"}, r"no shipped recipe is called 'rowwize'.*Did you mean 'rowwise'\?"),
        ({"recipe": {"defaults": {"input": {"format": "e4m3"}}}}, r"format 'e4m3' is ambiguous"),
        ({"recipe": 7}, r"a recipe is a shipped name, a path, a dict or a Recipe"),
        ({"exempt": ["upp"]}, r"exempt\[0\].*no module matches 'upp'. Did you mean 'up'\?"),
        ({"inner": "indcutor"}, r"ModelError.*inner='indcutor'.*Did you mean 'inductor'\?"),
        ({"inner_mode": "max-autotun"}, r"ModelError.*inner_mode='max-autotun'.*Did you mean 'max-autotune'\?"),
        ({"capture": "symbolic"}, r"unknown key 'capture'"),
    ],
)
def test_options_of_the_backend(options: dict[str, Any], message: str) -> None:
    called = torch.compile(seeded(Mlp), backend="fp8fx", options=options)
    with pytest.raises(Exception, match="(?s)" + message):
        called(data(4, 16))


def test_mode_and_options_are_torchs_own_refusal_and_a_mode_alone_is_ours() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(seeded(Mlp), backend="fp8fx", mode="reduce-overhead", options={"recipe": "hybrid"})
    called = torch.compile(seeded(Mlp), backend="fp8fx", mode="reduce-overhead")
    with pytest.raises(Exception, match=r"(?s)ModelError.*takes options=..., not mode;.*options=\{'inner_mode': ...\}"):
        called(data(4, 16))


@pytest.mark.parametrize("entry", ["compile", "backend"])
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"extends": "hybrid", "rules": [{"match": {"op": "conv2d"}, "mode": "direct"}]}, r"op: conv2d.*matches nothing"),
        (
            {"extends": "direct", "defaults": {"grad_output": {"overflow": "saturate"}}},
            r"impossible with loss_scaling.mode dynamic.*allowed: nonfinite",
        ),
        (
            {"extends": "hybrid", "defaults": {"input": {"scaling": "none", "granularity": "row"}}},
            r"scaling: none has no scale to give each row.*allowed: scaling: current",
        ),
    ],
)
def test_a_recipe_that_cannot_be_honoured(recipe: dict[str, Any], message: str, entry: str) -> None:
    with pytest.raises(Exception, match="(?s)" + message) as caught:
        enter(seeded(Mlp), recipe, entry)(data(4, 16))
    assert entry == "backend" or isinstance(caught.value, fp8fx.RecipeError)


def test_a_function_is_no_model() -> None:
    called = torch.compile(lambda x: x @ x.mT, backend="fp8fx")
    with pytest.raises(Exception, match=r"(?s)CaptureError.*the fp8fx backend compiles modules.*not a plain function"):
        called(data(4, 16))


def test_compiling_what_the_backend_compiles_is_refused() -> None:
    wrapped = enter(seeded(Mlp), entry="backend")
    with pytest.raises(fp8fx.ModelError, match=r"torch.compile'd wrapper; pass the model inside"):
        fp8fx.compile(wrapped)
    with pytest.raises(fp8fx.ModelError, match=r"torch.compile'd model so far: under backend='fp8fx' call it once before its plan"):
        fp8fx.plan(wrapped)  # nothing is captured yet
    with pytest.raises(fp8fx.ModelError, match="keeps no quantized weights"):
        fp8fx.invalidate(wrapped)
    wrapped(data(4, 16))
    assert len(fp8fx.plan(wrapped).fp8) == 4
    fp8fx.invalidate(wrapped)


def test_names_in_options_are_those_of_the_compiled_model_behind_a_break() -> None:
    """Dynamo captures each block by itself there; a recipe still means the whole model's names."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            torch._dynamo.graph_break()
            return torch.tanh(x)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    called = enter(seeded(Blocks), entry="backend", exempt=["blocks.1"])
    called(data(4, 16))
    decisions = {row.name: row.decision for row in fp8fx.plan(called).rows}
    assert decisions == {"blocks.0.fc": "fp8", "blocks.1.fc": "exempt", "blocks.2.fc": "fp8"}


def test_a_model_is_compiled_anew_after_another_of_its_class_is_gone() -> None:
    """Dynamo's graphs of the first must not be run for the second."""
    import gc

    expected = enter(seeded(Mlp, 1))(data(4, 16))
    first = enter(seeded(Mlp), entry="backend")
    first(data(4, 16))
    second = enter(seeded(Mlp, 1), entry="backend")
    assert torch.equal(second(data(4, 16)), expected)
    del first
    gc.collect()
    assert torch.equal(second(data(4, 16)), expected)


class Products(nn.Module):
    """The part behind the break holds no module, and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()
        return torch.softmax(x @ x.mT, -1) @ x


def test_a_frame_without_a_module_belongs_to_the_model_that_runs_it() -> None:
    """Two models of a class, in turns, then the second alone: each call is counted where it belongs."""
    import gc

    recipe = {"extends": "hybrid", "defaults": {"rounding": "stochastic"}}
    x = data(4, 16)
    expected = enter(seeded(Products, 1), recipe)
    first, second = (enter(seeded(Products, seed), recipe, "backend") for seed in (0, 1))
    for _ in range(2):
        first(x)
        assert torch.equal(second(x), expected(x))
    del first
    gc.collect()
    assert torch.equal(second(x), expected(x))
