"""The README does what it says: its Python runs, its links lead somewhere, its commands, recipes and YAML exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

import fp8fx
from fp8fx import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs_as_it_stands(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), space)
    assert "1 of 2 layers, 100.0% of non-exempt FLOPs in FP8; 1 exempt; 0 fell back" in capsys.readouterr().out
    model = space["model"]
    assert isinstance(model, torch.nn.Module)
    model.load_state_dict(torch.load("model.pt", weights_only=True), strict=True)


def test_the_example_is_short() -> None:
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 20


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(wanted)
    assert [target for target in wanted if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"pip install .*'\.\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_commands_and_options_exist() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fp8fx ")]
    assert len(lines) > 5
    for line in lines:
        command, words = get_command(cli.app), line.split()[1:]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_table_has_every_shipped_recipe() -> None:
    table = README.split("## Recipes")[1].split("Recipes with dynamic")[0]
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\w+) \|$", table, re.MULTILINE)
    assert sorted(name for name, _ in rows) == fp8fx.Recipe.shipped()
    assert dict(rows) == {name: fp8fx.Recipe.load(name).loss_scaling.mode for name, _ in rows}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_load(text: str) -> None:
    assert fp8fx.Recipe.load(yaml.safe_load(text)).loss_scaling.mode == "none"


def test_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert fp8fx.__version__ in changelog
    assert changelog.startswith("# Changelog")


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_quickstart(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart.py", recipe])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "3 of 3 layers, 100.0% of non-exempt FLOPs in FP8" in out
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)$", out, re.MULTILINE)]
    assert losses[-1] < 0.5 * losses[0]
    assert "6 tensors to save: 0.weight, 0.bias" in out
