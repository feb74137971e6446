"""fuse: producers that quantize what they compute, and compound operators with one autograd formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes.models import Chain, Feed, together
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

MLP = "linear(act(linear(x, w1)), w2) = mlp(x, w1, w2)"
NORM = "quantize(layer_norm(x)) = layer_norm_quantize(x)"
EPILOGUE = "quantize(linear(x, w)) = linear_quantize(x, w)"


@pytest.fixture(scope="module")
def feed() -> Trace:
    return together("feed gelu", "hybrid")


def test_fuse_golden_norm_and_mlp(feed: Trace) -> None:
    feed.check_golden("fuse", "fuse")


def test_fuse_golden_epilogue() -> None:
    together("chain", "direct").check_golden("fuse_epilogue", "fuse")


def test_fuse_modified_true(feed: Trace) -> None:
    assert feed.result("fuse").modified


def test_fuse_modified_false() -> None:
    assert not Trace(nn.Sequential(nn.Linear(8, 8)), "hybrid", randn(2, 8)).result("fuse").modified


@pytest.mark.parametrize("name", ["feed gelu", "feed relu", "chain", "attention", "conv and norm"])
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_fuse_is_idempotent(name: str, recipe: str) -> None:
    together(name, recipe).assert_idempotent("fuse")


@pytest.mark.parametrize(("name", "act"), [("gelu", "gelu"), ("tanh gelu", "gelu_tanh"), ("relu", "relu"), ("silu", "silu")])
def test_linear_act_linear_is_one_operator(name: str, act: str) -> None:
    trace = together(f"feed {name}", "hybrid")
    (node,) = trace.graph("fuse").graph.find_nodes(op="call_function", target=torch.ops.fp8fx.mlp.default)
    assert act in node.args
    ops = trace.ops("fuse")
    assert ops["fp8fx.linear"] == 0
    assert ops["fp8fx.quantize"] == 2
    assert ops["fp8fx.layer_norm_quantize"] == 1


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_norm_quantizes(recipe: str) -> None:
    ops = together("feed gelu", recipe).ops("fuse")
    assert ops["layer_norm"] == 0
    assert ops["fp8fx.layer_norm_quantize"] == 1


def test_epilogue_rounds_the_output() -> None:
    ops = together("chain", "direct").ops("fuse")
    assert ops["fp8fx.linear_quantize"] == 2
    assert ops["fp8fx.linear"] == 0
    assert ops["fp8fx.quantize"] == 3  # two weights and x


# -- refusals -----------------------------------------------------------------------------------------------------------------


class Reads(Feed):
    """Feed with something that reads a tensor in the middle."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        h = self.up(n)
        a = F.gelu(h)
        y = self.down(a)
        return y + {"norm": n, "hidden": h, "activation": a}[self.where].sum()


def recipe(**rule: Any) -> dict[str, Any]:
    return {"extends": "hybrid", "rules": [{"match": "up", **rule}]}


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str, str]] = {
    "norm read": (lambda: Reads("norm"), "hybrid", NORM, "its output is also read in high precision"),
    "norm by rows": (
        Feed,
        recipe(input={"granularity": "row"}),
        NORM,
        "its output is quantized in more than one way",
    ),
    "hidden read": (lambda: Reads("hidden"), "hybrid", MLP, "the first linear's output is read elsewhere"),
    "activation read": (lambda: Reads("activation"), "hybrid", MLP, "the activation's output is read elsewhere"),
    "one GEMM in high precision": (Feed, recipe(gemms={"grad_input": "high_precision"}), MLP, "up: not all of its GEMMs read codes"),
    "weight by rows": (
        Feed,
        recipe(weight={"granularity": "row"}),
        MLP,
        "up: an operand stays in high precision, or needs two quantizations",
    ),
    "second linear's input in high precision": (
        Feed,
        {"extends": "hybrid", "rules": [{"match": "down", "input": "none"}]},
        MLP,
        "the second linear does not quantize the activation itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_stays_with_a_reason(name: str) -> None:
    make, chosen, rule, reason = REFUSED[name]
    trace = Trace(seeded(make), chosen, randn(3, 8))
    assert (rule, reason) in {(skip.rule, skip.reason) for skip in trace.skips("fuse")}
    assert any(reason in text for text in trace.plan.skips)
    fused = {MLP: "fp8fx.mlp", NORM: "fp8fx.layer_norm_quantize"}[rule]
    assert trace.ops("fuse")[fused] == 0


def test_an_output_that_the_next_site_quantizes_is_no_epilogue() -> None:
    """Under hybrid the quantize of the second linear's input is the second site's: no role rounds the first output."""
    ops = Trace(seeded(Chain), "hybrid", randn(3, 8)).ops("fuse")
    assert ops["fp8fx.linear_quantize"] == 0
    assert ops["fp8fx.linear"] == 2


def test_autocast_keeps_the_norm_apart() -> None:
    """Under autocast a norm turns bf16 into float32: its own dtype rules are left alone."""
    model = seeded(Feed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = Trace(model, "hybrid", randn(3, 8, dtype=torch.bfloat16))
        reasons = {skip.reason for skip in trace.skips("fuse")}
        fused = trace.ops("fuse")["fp8fx.layer_norm_quantize"]
    assert fused == 1 or "autocast changes its dtype" in reasons


def test_other_activations_are_no_pattern() -> None:
    trace = Trace(seeded(Feed, torch.tanh), "hybrid", randn(3, 8))
    assert trace.ops("fuse")["fp8fx.linear"] == 2
    assert not [skip for skip in trace.skips("fuse") if skip.rule == MLP]
