"""The plan of a compiled model, and what is said of it."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_net import Mixed, Net, make, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fp8fx

# -- what is said ---------------------------------------------------------------------------------------------------------


def test_one_info_line_after_the_first_capture(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8fx")
    fast = fp8fx.compile(make(), exempt=["head"])
    assert caplog.messages == []
    fast(rows())
    fast(rows(4))
    expected = "fp8fx: 2 of 3 layers, 100.0% of non-exempt FLOPs in FP8; 1 exempt; 0 fell back"
    assert caplog.messages == [expected]


def test_warning_when_nothing_runs_in_fp8(caplog: pytest.LogCaptureFixture) -> None:
    fast = fp8fx.compile(make(), exempt=["*"])
    with pytest.warns(fp8fx.FP8Warning, match=r"no layer runs in FP8: 0 of 3 layers.* 3 exempt"):
        fast(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8fx.compile(make(), "none")(rows())  # asked for


# -- plan -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [rows(), (rows(), torch.ones(4)), [rows()], {"x": rows(), "scale": 2.0}])
def test_example_inputs_as_tensor_tuple_or_dict(inputs: Any) -> None:
    plan = fp8fx.plan(make(), "hybrid", example_inputs=inputs)
    assert [row.name for row in plan.rows] == ["fc1", "fc2", "head"]
    assert [row.shape for row in plan.rows] == ["6x16x8", "6x16x16", "6x4x16"]
    assert plan.flops == 2 * 6 * (16 * 8 + 16 * 16 + 4 * 16)
    assert plan.fp8_flops_share == 1.0


def test_plan_without_example_inputs() -> None:
    plan = fp8fx.plan(make(), "hybrid", exempt=["head"])
    assert [(row.name, row.decision) for row in plan.rows] == [("fc1", "fp8"), ("fc2", "fp8"), ("head", "exempt")]
    assert plan.flops == 0
    assert plan.summary == "2 of 3 layers in FP8, FLOPs not known; 1 exempt; 0 fell back"
    with pytest.raises(fp8fx.CaptureError, match="needs example_inputs"):
        fp8fx.plan(make(), capture="dynamo")


def test_plan_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    saved, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fp8fx.plan(model, example_inputs=rows())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "none"])
@pytest.mark.parametrize(("cls", "x"), [(Net, rows()), (Mixed, torch.arange(10).reshape(2, 5))])
def test_both_front_ends_give_the_same_plan(cls: type[nn.Module], x: Tensor, recipe: str) -> None:
    plans = [fp8fx.plan(cls(), recipe, example_inputs=x, capture=capture) for capture in ("dynamo", "symbolic")]
    assert plans[0].rows == plans[1].rows
    assert str(plans[0]) == str(plans[1])


def test_symbolic_capture_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    for model, x in ((make(), rows()), (Mixed(), torch.arange(10).reshape(2, 5))):
        results = []
        for capture in ("dynamo", "symbolic"):
            model.zero_grad(set_to_none=True)
            fast = fp8fx.compile(model, "emulation-direct", capture=capture)
            y = fast(x)
            (y.square().sum() * 1024).backward()
            results.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 3
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_symbolic_capture_follows_arguments_modes_and_new_weights() -> None:
    fast, mask = fp8fx.compile(make(), capture="symbolic"), torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = fp8fx.compile(make())
    for _ in range(2):
        assert torch.equal(fast(rows()), expected(rows()))
        assert torch.equal(fast(rows(), mask, scale=3.0), expected(rows(), mask, scale=3.0))
        assert torch.equal(fast(rows(2)), expected(rows(2)))
    fast.load_state_dict(make(3).state_dict(), assign=True)
    assert torch.equal(fast(rows()), fp8fx.compile(make(3))(rows()))


def test_plan_lists_what_was_not_called() -> None:
    plan = fp8fx.plan(Mixed(), example_inputs=torch.arange(10).reshape(2, 5))
    assert [row.name for row in plan.not_captured] == ["unused"]
    assert "not called" in plan["unused"].reason
    assert "of captured non-exempt FLOPs in FP8" in plan.summary, "what was not called has none"
    assert plan["q"].calls == 2
    assert [row.name for row in plan.rows if row.op == "matmul"] == ["matmul", "matmul_1"]


def test_names_of_torch_s_own_modules_and_of_parametrized_layers() -> None:
    """torch.nn's forwards are captured through a wrapper, and a parametrized layer computes its weight: names stay theirs."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    names = [row.name for row in fp8fx.plan(encoder, example_inputs=torch.randn(2, 5, 16)).rows]
    expected = ["self_attn.in_proj_weight", "self_attn.attention", "self_attn.out_proj", "linear1", "linear2"]
    assert names == expected
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 4)))
    plan = fp8fx.plan(normed, example_inputs=rows(), exempt=["1"])
    assert (plan["0"].decision, plan["1"].decision) == ("fp8", "exempt")
    assert plan.not_captured == []


def test_exempt_and_output_fused_arguments() -> None:
    model = make()
    plan = fp8fx.plan(model, "direct", example_inputs=rows(), exempt=["fc1"], output_fused=["head"])
    assert plan["fc1"].decision == "exempt"
    assert "output fused" in plan["head"].reason
    assert "output" not in plan["head"].formats
    assert "output e5m2" in fp8fx.plan(model, "direct", example_inputs=rows())["head"].formats
    fast = fp8fx.compile(model, "direct", exempt=[{"type": "Linear"}, "head"])
    with pytest.warns(fp8fx.FP8Warning, match="no layer runs"):
        assert torch.equal(fast(rows()), model(rows()))


def test_recipe_as_name_path_dict_and_object(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hybrid\nexempt: [head]\n")
    forms: list[Any] = [path, str(path), {"extends": "hybrid", "exempt": ["head"]}, fp8fx.Recipe.load(path)]
    outputs = [fp8fx.compile(make(), recipe)(rows()) for recipe in forms]
    outputs.append(fp8fx.compile(make(), "hybrid", exempt=["head"])(rows()))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert torch.equal(fp8fx.compile(make())(rows()), fp8fx.compile(make(), "hybrid")(rows()))


def test_formats_name_operands_in_high_precision() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16))
    indices = torch.zeros(4, dtype=torch.long)

    def formats(**defaults: str) -> list[str]:
        plan = fp8fx.plan(model, {"extends": "hybrid", "defaults": defaults}, example_inputs=(indices,))
        return [row.formats for row in plan.rows]

    assert formats() == ["e4m3fn, grad e5m2", "e4m3fn x e4m3fn, grad e5m2"]
    assert formats(input="none")[1] == "high precision x e4m3fn, grad e5m2"
    assert formats(weight="none")[1] == "e4m3fn x high precision, grad e5m2"
    assert formats(input="none", weight="none") == ["grad e5m2"] * 2
