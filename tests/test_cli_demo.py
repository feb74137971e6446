"""`fp8fx demo`: how it passes its options on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import run

from fp8fx.demo import runner
from fp8fx.demo.tasks import TASKS


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fake(**options: Any) -> int:
        calls.append(options)
        return len(calls) - 1

    monkeypatch.setattr("fp8fx.demo.run", fake)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    run("demo")
    run("demo", "--quick", "-m", "digits", "-r", "direct", "-r", "none", "--seed", "3", "--steps", "5", "-o", str(tmp_path), code=1)
    assert calls[0] == {
        "out": Path("demo-out"), "quick": False, "recipes": runner.RECIPES, "models": tuple(TASKS), "steps": None, "seed": 0,
        "processes": 7,
    }  # fmt: skip
    assert calls[1] == {
        "out": tmp_path, "quick": True, "recipes": ("direct", "none"), "models": ("digits",), "steps": 5, "seed": 3, "processes": 7,
    }  # fmt: skip


def test_demo_runs(tmp_path: Path) -> None:
    out, _ = run("demo", "--steps", "2", "-m", "digits", "-r", "hybrid", "-o", str(tmp_path))
    assert "digits / hybrid" in out
    assert "PASS  digits hybrid" in out
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "curves.png", "graphs", "digits-hybrid-plan.txt"}


def test_demo_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "gpt" in run("demo", "-m", "gtp", code=2)[1]
    _, err = run("demo", "--steps", "1", "-m", "digits", "-r", "hybird", "-o", str(tmp_path), code=2)
    assert "Did you mean 'hybrid'?" in err
