"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from torch import nn
from typer.testing import CliRunner

import fp8fx
from fp8fx import cli, pipeline, targets
from fp8fx.demo.tasks import TASKS

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, mask=None):
        y = self.fc2(torch.relu(self.fc1(x)))
        return y if mask is None else y.masked_fill(mask, 0.0)

class Tokens(nn.Module):
    def __init__(self, vocabulary=10):
        super().__init__()
        self.embed, self.out = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)

    def forward(self, index):
        return self.out(self.embed(index))

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 1e9:
            return x
        return self.b(x)

def half():
    return Net().half()

def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def broken():
    raise OSError("no weights here")

class Odd(nn.Linear):
    def forward(self, x):
        raise KeyError("odd")

def without_torchvision():
    raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

def other_torchvision():
    raise RuntimeError("operator torchvision::nms does not exist")

def odd():
    return Odd(8, 8)

def wide(width):
    return nn.Linear(width, width)

model = Net()
number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of models. What a target imports is looked for beside it too, which is undone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "tiny_models.py"
    path.write_text(MODELS)
    return str(path)


# -- the top --------------------------------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    for args in [], ["--help"], ["-h"]:
        out, _ = run(*args)
        assert all(word in out for word in ("Usage: ", "plan", "recipe", "demo"))
    out, _ = run("--version")
    assert [line.split()[0] for line in out.splitlines()] == ["fp8fx", "torch", "triton", "python", "device"]
    assert fp8fx.__version__ in out
    assert torch.__version__ in out


def test_the_installed_command_prints_one_message_and_no_traceback() -> None:
    command = [sys.executable, "-P", "-c", "from fp8fx.cli import main; main()", "recipe", "show", "hybird"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no shipped recipe is called 'hybird'")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(cli.app, ["--debug", "recipe", "show", "hybird"])
    assert isinstance(result.exception, fp8fx.RecipeError)


def test_unknown_commands_and_options() -> None:
    for args in ["plna"], ["plan"], ["plan", "x.py:f", "--capture", "magic"], ["recipe", "chek", "x"]:
        _, err = run(*args, code=2)
        assert "Usage: " in err


# -- plan -----------------------------------------------------------------------------------------------------------------


def test_plan_of_a_file(models: str) -> None:
    out, _ = run("plan", f"{models}:Net", "-i", "2x8")
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    assert "recipe hybrid" in out
    assert "2x16x8" in out
    assert "2 of 2 layers, 100.0% of non-exempt FLOPs in FP8; 0 exempt; 0 fell back" in out
    assert f"{2 * 2 * sum(p.numel() for p in net.parameters() if p.dim() == 2):,}" in out


def test_plan_without_inputs_and_with_options(models: str, tmp_path: Path) -> None:
    out, _ = run("plan", f"{models}:model", "--recipe", "direct", "--exempt", "fc1", "--output-fused", "fc2")
    assert "recipe direct" in out
    assert "exempt 'fc1'" in out
    assert "output fused" in out
    assert "FLOPs not known" in out
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: hybrid\nexempt: [fc2]\n")
    out, _ = run("plan", f"{models}:Net", "-r", str(mine), "-i", "2x8", "--capture", "symbolic")
    assert "1 of 2 layers, 100.0% of non-exempt FLOPs in FP8; 1 exempt" in out


def test_plan_of_a_module_by_name(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(models).parent)
    out, _ = run("plan", "tiny_models:Tokens", "-i", "2x5:int64")
    assert "embed" in out
    out, _ = run("plan", "torch.nn:Identity", "-i", "2x5")
    assert "0 of 0 layers" in out


def test_inputs_follow_the_model_s_dtype_and_names(models: str) -> None:
    assert "2 of 2 layers" in run("plan", f"{models}:half", "-i", "2x8")[0]
    assert "2 of 2 layers" in run("plan", f"{models}:Net", "-i", "2x8", "-i", "mask=2x4:bool")[0]
    assert "2 of 2 layers" in run("plan", f"{models}:Net", "-i", "x=2x8:float32")[0]
    assert "1x3x9x9" in run("plan", f"{models}:convolution", "-i", "1x3x9x9")[0]


def test_json(models: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    run("plan", f"{models}:Net", "-i", "2x8", "--exempt", "fc2", "--json", str(file))
    saved = json.loads(file.read_text())
    assert saved["totals"]["exempt_layers"] == 1
    assert [row["decision"] for row in saved["rows"]] == ["fp8", "exempt"]
    assert "cannot be written" in refused_after_plan("plan", f"{models}:Net", "--json", str(tmp_path / "no" / "plan.json"))


def refused_after_plan(*args: str) -> str:
    out, err = run(*args, code=2)
    assert "fp8fx plan" in out
    return err


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
def test_graphs(models: str, tmp_path: Path, capture: str) -> None:
    folder = tmp_path / "graphs"
    arguments = ["plan", f"{models}:Net", "-i", "2x8", "--capture", capture]
    out, _ = run(*arguments, "--graph", "insert_qdq", "--save-graphs", str(folder))
    assert "# graph 0 of 1, after insert_qdq" in out
    assert re.search(r"= linear\(\w+, fc1_weight\w*, fc1_bias\w*, input=\[q_\w+, s_\w+\]", out)
    names = [f"graph-0-{number}-{stage}.txt" for number, stage in enumerate(pipeline.STAGES)]
    assert sorted(path.name for path in folder.iterdir()) == names
    texts = {stage: (folder / name).read_text() for name, stage in zip(names, pipeline.STAGES, strict=True)}
    assert "quantize" not in texts["capture"]
    assert "# site 'fc1': fp8 (defaults (hybrid))" in texts["annotate"]
    assert "fp8_weight_0_q" in texts["lower"]


def test_every_graph_of_a_broken_capture_is_shown(models: str, tmp_path: Path) -> None:
    out, _ = run("plan", f"{models}:Branch", "-i", "2x8", "--graph", "capture", "--save-graphs", str(tmp_path))
    assert "# graph 1 of 2, after capture" in out
    assert len(list(tmp_path.glob("graph-1-*.txt"))) == len(pipeline.STAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{models}:Nett"], "has no 'Nett'. Did you mean 'Net'?"),
        (["{models}:number"], "is a int: a torch.nn.Module, or something that returns one, is needed"),
        (["{models}:wide"], "needs arguments (width)"),
        (["{models}:broken"], "failed when called: OSError: no weights here"),
        (["{models}"], "write package.module:name or file.py:name"),
        (["nowhere.py:Net"], "nowhere.py: there is no such file"),
        (["no.such.package:Net"], "no.such.package cannot be imported: ModuleNotFoundError"),
        (["builtins:dict"], "gave a dict, not a torch.nn.Module"),
        (["{models}:Net", "-i", "2xa"], "write [name=]SHAPE[:dtype]"),
        (["{models}:Net", "-i", ""], "write [name=]SHAPE[:dtype]"),
        (["{models}:Net", "-i", "2x8:flaot32"], "there is no dtype 'flaot32'"),
        (["{models}:Net", "-i", "y=2x8"], "--input does not fit Net.forward(x, mask=None)"),
        (["{models}:Net", "-i", "x=2x8", "-i", "x=2x8"], "--input x is given twice"),
        (["{models}:Net", "-i", "2x9"], "Net.forward fails on the inputs float32 [2, 9]: RuntimeError: mat1 and mat2 shapes cannot be"),
        (
            ["{models}:Tokens", "-i", "2x5:int64", "-i", "3"],
            "fails on the inputs int64 [2, 5] of 0 to 9, float32 [3]: TypeError: Tokens.forward() takes 2",
        ),
        (["{models}:Tokens", "-i", "index=50:int64", "--high", "99"], " to 99: IndexError: index out of range"),
        (["{models}:Tokens", "-i", "50:int64", "--high", "99", "--graph", "lower"], " to 99: IndexError: index out of range"),
        (["{models}:Tokens", "-i", "50:int64", "--high", "99", "--capture", "symbolic"], " to 99: IndexError: index out of range"),
        (["{models}:odd", "-i", "2x8"], "Odd.forward fails on the inputs float32 [2, 8]: KeyError: 'odd'"),
        (["{models}:without_torchvision"], "The package torchvision is not installed: pip install torchvision"),
        (["{models}:other_torchvision"], "The installed torchvision is built for another build of torch than"),
        (["nowhere:Net"], "No package 'nowhere' is installed, and nowhere.py is not in this folder either"),
        (["{models}:Net", "-i", "2x8", "--save-graphs", "{models}"], "tiny_models.py is a file; a folder is wanted"),
        (["{models}:Net", "-i", "2x8", "--save-graphs", "{models}/graphs"], "tiny_models.py is a file; a folder is wanted"),
        (["{models}:Branch"], "cannot be traced symbolically"),
        (["{models}:Net", "--capture", "dynamo"], "needs example_inputs"),
        (["{models}:Net", "--graph", "lower"], "give --input"),
        (["{models}:Net", "-i", "2x8", "--graph", "lowr"], "no stage 'lowr'; there are capture"),
        (["{models}:Net", "--exempt", "fc3"], "no module matches 'fc3'. Did you mean 'fc"),
        (["{models}:Net", "-r", "hybird"], "Did you mean 'hybrid'?"),
    ],
)
def test_mistakes(models: str, arguments: list[str], message: str) -> None:
    assert message in refused("plan", *(argument.format(models=models) for argument in arguments))


def test_a_failure_that_is_not_the_model_s_shows_its_traceback(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(fp8fx, "plan", fail)
    result = CliRunner().invoke(cli.app, ["plan", f"{models}:Net", "-i", "2x8"])
    assert isinstance(result.exception, KeyError)


def test_integer_inputs_stay_small() -> None:
    (value,) = targets.sample_inputs(["50x50:int64"], nn.Linear(2, 2))
    assert (value.min(), value.max()) == (0, 9)
    (value,) = targets.sample_inputs(["50x50:int32"], nn.Linear(2, 2), high=2)
    assert value.unique().tolist() == [0, 1, 2]
    (value,) = targets.sample_inputs(["50:bool"], nn.Linear(2, 2))
    assert value.unique().tolist() == [False, True]
    assert torch.equal(targets.sample_inputs(["3"], nn.Linear(2, 2))[0], targets.sample_inputs(["3"], nn.Linear(2, 2))[0])
    assert targets.sample_inputs(["0x8:bfloat16"], nn.Linear(2, 2))[0].shape == (0, 8)


# -- recipe ---------------------------------------------------------------------------------------------------------------


def test_recipe_list() -> None:
    out, _ = run("recipe", "list")
    assert [line.split()[0] for line in out.splitlines() if line[:1].strip()] == ["recipe", *fp8fx.Recipe.shipped()]
    assert "Weights and inputs in E4M3, gradients in E5M2" in out


@pytest.mark.parametrize("name", ["hybrid", "rowwise", "blockwise", "direct", "none", "emulation-direct"])
def test_recipe_show_prints_an_equal_recipe(name: str, tmp_path: Path) -> None:
    out, _ = run("recipe", "show", name)
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert fp8fx.Recipe.load(path) == fp8fx.Recipe.load(name)


def test_recipe_check(models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hybrid\nexempt: [fc3]\n")
    assert run("recipe", "check", str(path))[0] == f"{path}: ok, hybrid, 1 rule, 1 exempt\n"
    assert f"{path}:2: exempt[0]: no module matches 'fc3'" in refused("recipe", "check", str(path), "--model", f"{models}:Net")
    assert "ok for" in run("recipe", "check", "hybrid", "--model", f"{models}:Net")[0]
    path.write_text("extends: hybrid\nexmpt: [fc3]\n")
    assert f"{path}:2: exmpt: unknown key" in refused("recipe", "check", str(path))
    assert "no shipped recipe is called 'hybird'" in refused("recipe", "check", "hybird")
    monkeypatch.chdir(tmp_path)
    Path("recipe.txt").write_text("extends: direct\n")
    assert "ok, direct" in run("recipe", "check", "recipe.txt")[0]


def test_recipe_check_shows_what_strict_false_lets_pass(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hybrid\nstrict: false\nexmpt: [fc3]\n")
    out, err = run("recipe", "check", str(path))
    assert "ok" in out
    assert err.startswith("warning: ")
    assert "unknown key" in err


def test_recipe_schema() -> None:
    out, _ = run("recipe", "schema")
    assert json.loads(out) == fp8fx.Recipe.schema()


# -- what is documented ---------------------------------------------------------------------------------------------------


def test_stages_are_the_pipeline_s() -> None:
    out, _ = run("plan", "--help")
    assert all(stage in out for stage in pipeline.STAGES)
    assert tuple(cli.DemoModel) == tuple(TASKS)


def names(parameters: Sequence[Any]) -> set[str]:
    return {option for parameter in parameters for option in parameter.opts}


def test_options_of_plan_are_those_documented() -> None:
    from typer.main import get_command

    command = get_command(cli.app).commands["plan"]  # type: ignore[attr-defined]
    documented = {
        "--recipe",
        "--input",
        "--exempt",
        "--output-fused",
        "--capture",
        "--json",
        "--graph",
        "--save-graphs",
        "--high",
        "--seed",
    }
    assert documented <= names(command.params)
