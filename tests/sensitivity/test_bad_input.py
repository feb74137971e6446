"""Data, losses, recipes, budgets and paths that cannot be used: a message that says what and where, and nothing half-written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fp8fx
from fp8fx import FP8Error, ModelError, cli
from fp8fx.sensitivity import Budget


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def good(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(4, 8), torch.randint(0, 3, (4,))


def refused(match: str, data: Any = None, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        fp8fx.sensitivity(options.pop("model", None) or net(), list(good(1)) if data is None else data, **options)


def spoiled(value: float) -> list[tuple[Tensor, Tensor]]:
    batches = list(good(2))
    batches[1][0][2, 5] = value
    return batches


def test_data() -> None:
    refused("data holds no batch", [])
    refused("data ended after 3 of 5 batches: give more data, or batches=3", good(3), batches=5)
    refused(r"batch 1 of data\[0\] is not finite: 1 of 32 elements, the first at \(2, 5\): nan", spoiled(math.nan))
    refused(r"batch 1 of data\[0\] is not finite.*-inf", spoiled(-math.inf))
    refused(r"batch 0 of data\[0\] has no elements: its shape is \(0, 8\)", [(torch.randn(0, 8), torch.zeros(0))])
    refused("data is an iterable of batches, got a tensor of shape .*put it in a list", torch.randn(4, 8))
    refused("batches is how many", batches=0)
    refused(r"data is an iterable of batches, got the function good: call it, data=good\(\)", good)
    refused("batch 2 of data cannot be read: OSError: the disk is gone", broken(2))
    wrong = [*good(1), (torch.randn(4, 9), torch.randint(0, 3, (4,)))]
    refused(r"batch 1 of data, \(float32 \[4, 9\], int64 \[4\]\): in high precision already.*RuntimeError: mat1", wrong)


def broken(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from good(count)
    raise OSError("the disk is gone")


def test_an_additive_mask_is_finite_enough() -> None:
    mask = torch.zeros(4, 8).masked_fill(torch.ones(4, 8).triu(1).bool(), -math.inf)
    model = nn.Sequential(nn.Softmax(-1), nn.Linear(8, 3))
    assert fp8fx.sensitivity(model, [(mask, torch.tensor([0, 1, 2, 0]))], gradients=False, switch_off=False).layers


def test_losses() -> None:
    refused("the loss of batch 0 is a tensor of shape \\(4, 3\\), not a scalar", loss=lambda model, batch: model(batch[0]))
    refused("the loss of batch 0 is a str: the loss is one number", loss=lambda model, batch: "low")
    refused("the loss of batch 0 is nan in high precision already", loss=lambda model, batch: model(batch[0]).sum() * math.nan)
    refused("the loss has no gradient.*gradients=False", loss=lambda model, batch: model(batch[0]).sum().item())
    refused("loss is called with model and batch, and this one cannot be", loss=lambda model: 0.0)
    refused("loss is a function of model and batch", loss=3)
    refused("the model gives no loss: its output is float32 \\[4, 3\\]", [torch.randn(4, 8)])
    refused("the target's shape is \\(4,\\), the output's \\(4, 3\\)", [(torch.randn(4, 8), torch.randn(4))])
    refused("integer targets are classes", [(torch.randn(4, 8), torch.zeros(3, dtype=torch.int64))])


def test_a_recipe_without_fp8_and_frozen_models() -> None:
    refused("no layer runs in FP8 under recipe 'none'.*0: exempt", recipe="none")
    refused("no layer runs in FP8", exempt=["*"])
    frozen = net().requires_grad_(False)
    found = fp8fx.sensitivity(frozen, good(1), switch_off=False)
    assert found.notes == ["gradients were not looked at: no parameter requires one"]
    assert {role.role for layer in found.layers for role in layer.roles} == {"input", "weight"}


@pytest.mark.parametrize("budget", ["1 percent", "-1%", -0.5, math.nan, "", True, "nan%", [1]])
def test_budgets(budget: Any) -> None:
    with pytest.raises(ModelError, match=r"allowed are a relative increase such as '1%' and an absolute one such as 0.02"):
        Budget.parse(budget)


def test_what_a_budget_allows() -> None:
    assert Budget.parse("2%").limit(-3.0) == pytest.approx(-2.94)
    assert Budget.parse("0.5").limit(2.0) == Budget.parse(0.5).limit(2.0) == 2.5
    assert not Budget.parse("5%").met(math.nan, 1.0)
    assert str(Budget.parse("0.25%")) == "0.25%"


def test_a_budget_that_cannot_be_met_says_the_figures_and_writes_nothing(tmp_path: Path) -> None:
    plain = net().eval()

    def distance(model: nn.Module, batch: Any) -> Tensor:
        return 1 + (model(batch[0]) - plain(batch[0])).square().mean()

    found = fp8fx.sensitivity(plain, good(1), loss=distance, gradients=False)
    with pytest.raises(ModelError, match=r"budget 0% cannot be met with any layer in FP8: the loss is 1 in.*with '(0|2)' alone"):
        found.suggest("0%")
    with pytest.raises(ModelError, match="there is no suggestion to save"):
        found.save_suggestion(tmp_path / "out.yaml")
    assert found.suggest("100%") is not None
    assert found.suggestion is not None
    with pytest.raises(ModelError, match="cannot be met"):
        found.suggest("0%")
    with pytest.raises(ModelError, match="there is no suggestion to save"):  # not the older one
        found.save_suggestion(tmp_path / "out.yaml")
    with pytest.raises(ModelError, match="cannot be met"):
        found.save_suggestion(tmp_path / "out.yaml", "0%")
    found.save_suggestion(tmp_path / "good.yaml", "100%")
    assert "budget 100%" in (tmp_path / "good.yaml").read_text()
    kept = found.suggestion
    found.save_suggestion(tmp_path / "good.yaml", budget="100%")
    assert found.suggestion is kept
    (tmp_path / "good.yaml").unlink()
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "none" / "out.yaml", tmp_path / "there"):
        with pytest.raises(FP8Error, match="cannot be written"):
            found.save_suggestion(path)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_names() -> None:
    found = fp8fx.sensitivity(nn.Sequential(nn.Linear(8, 3)), good(1), gradients=False)
    assert found.effect("0") == found.effect(found["0"])
    assert found.gain("0") == found.gain(found["0"])
    for ask in (found.effect, found.gain, found.__getitem__):
        with pytest.raises(ModelError, match=r"no layer '00' was measured; layers in FP8 are: 0. Did you mean '0'"):
            ask("00")
    with pytest.raises(ModelError, match=r"layer '0' has no role 'wieght'; it has: input, weight. Did you mean 'weight'"):
        found["0"]["wieght"]


MODELS = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)
    def forward(self, x):
        return {"loss": self.fc(x).square().mean()}
def batches():
    yield torch.randn(4, 8), torch.randint(0, 3, (4,))
def broken():
    yield torch.randn(4, 8), torch.randint(0, 3, (4,))
    raise OSError("the disk is gone")
def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
def impossible(model, batch):
    return 1 + (model(batch[0]) - high(batch[0])).square().mean()
import copy
high = copy.deepcopy(model).eval()
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODELS)

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["sensitivity", *words])
        return done.exit_code, done.output + done.stderr

    out, page, figures = tmp_path / "out.yaml", tmp_path / "out.html", tmp_path / "out.json"
    common = (f"{file}:model", "--data", f"{file}:batches")
    files = ("--suggest", str(out), "--html", str(page), "--json", str(figures))
    code, text = run(*common, "--loss", f"{file}:loss", "--budget", "50%", *files)
    assert code == 0, text
    assert "sensitivity of Sequential, recipe hybrid" in text
    assert all(path.is_file() for path in (out, page, figures))
    assert fp8fx.Recipe.load(out) == fp8fx.Recipe.load("hybrid")
    for path in (out, page, figures):
        path.unlink()

    code, text = run(*common, "--loss", f"{file}:impossible", "--budget", "0", "--no-gradients", *files)
    assert (code, out.exists(), page.exists(), figures.exists()) == (2, False, True, True)
    assert "cannot be met with any layer in FP8" in text
    code, text = run(f"{file}:Own", "--input", "4x8", "--no-switch-off")
    assert code == 0, text
    for words, said in (
        ((f"{file}:model",), "give either --data module:name, or --input"),
        ((*common, "--suggest", str(out)), "give --budget, e.g. --budget 1%"),
        ((*common, "--budget", "a lot"), "budget 'a lot'"),
        ((*common, "--html", str(tmp_path / "none" / "x.html")), "there is no folder"),
        ((f"{file}:model", "--data", f"{file}:broken"), "error: batch 1 of data cannot be read: OSError: the disk is gone"),
        ((*common, "--batches", "4"), "data ended after 1 of 4 batches"),
    ):
        code, text = run(*words)
        assert code == 2
        assert said in text
    assert not out.exists()
