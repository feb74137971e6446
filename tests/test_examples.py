"""What the examples say to arguments that they do not know, and where a package is missing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit status."""
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as found:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return found.value.code


def packages(name: str) -> None:
    """Skip where one is missing that the example looks for before its arguments."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    for package in ("transformers", "accelerate", "lightning", "tensorboard", "sklearn"):
        if f'"{package}"' in text or f"\nfrom {package}" in text:
            pytest.importorskip(package)


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_arguments_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    packages(name)
    assert run(name, "--tinny", monkeypatch=monkeypatch) == 2
    assert "unrecognized arguments: --tinny" in capsys.readouterr().err
    assert run(name, "--help", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}")


@pytest.mark.parametrize("name", ["train_gpt.py", "train_resnet.py"])
@pytest.mark.parametrize("steps", ["0", "-3", "abc"])
def test_steps_are_a_number(name: str, steps: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "hybrid", steps, monkeypatch=monkeypatch) == 2
    assert f"{steps!r} is no number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "accelerate", "lightning"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = str(run(f"train_with_{package}.py", monkeypatch=monkeypatch))
    assert said.startswith(f"this example needs what is not installed: {package}")
    assert said.endswith("pip install '.[trainers]'")
