from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from demo_results import result
from rich.console import Console
from torch import nn

import fp8fx
from fp8fx.demo import artifacts, report
from fp8fx.demo.progress import progress
from fp8fx.demo.tasks import TASKS, Task


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: build() for name, build in TASKS.items()}


GOOD = [
    result("gpt", "none"),
    result("gpt", "hybrid", loss=2.01),
    result("digits", "none"),
    result("digits", "direct", accuracy=0.975),
]


def test_bars_pass_and_fail(tasks: dict[str, Task]) -> None:
    assert all(v.passed for v in report.verdicts(GOOD, tasks, judge_quality=True))
    bad = [GOOD[0], result("gpt", "hybrid", loss=2.03, fp8_share=0.9), GOOD[2], result("digits", "hybrid", accuracy=0.96)]
    failed = [v.text for v in report.verdicts(bad, tasks, judge_quality=True) if not v.passed]
    assert len(failed) == 3
    assert "gpt hybrid: held-out loss +1.50%, asked within 1% of none" in failed[0]
    for recipe in ("delayed", "rowwise", "blockwise"):
        near, far = (report.verdicts([GOOD[0], result("gpt", recipe, loss=loss)], tasks, judge_quality=True) for loss in (2.019, 2.021))
        assert [v.passed for v in (*near, *far)] == [True, True, False, True]
    assert "90.0% of non-exempt FLOPs" in failed[1]
    assert "digits hybrid: accuracy -2.00 points" in failed[2]


def test_better_than_none_passes(tasks: dict[str, Task]) -> None:
    better = [GOOD[0], result("gpt", "direct", loss=1.5), GOOD[2], result("digits", "hybrid", accuracy=1.0)]
    assert all(v.passed for v in report.verdicts(better, tasks, judge_quality=True))


def test_a_shortened_run_is_judged_on_coverage_and_divergence_only(tasks: dict[str, Task]) -> None:
    bad = [GOOD[0], result("gpt", "hybrid", loss=9.0), result("gpt", "direct", diverged="diverged at step 1: the loss is nan")]
    texts = {v.text: v.passed for v in report.verdicts(bad, tasks, judge_quality=False)}
    assert [text for text, passed in texts.items() if not passed] == ["gpt direct: diverged at step 1: the loss is nan (seed 0)"]


def test_without_a_baseline_the_bar_fails_and_says_so(tasks: dict[str, Task]) -> None:
    (verdict, _) = report.verdicts([GOOD[1]], tasks, judge_quality=True)
    assert not verdict.passed
    assert "a none run is missing" in verdict.text


def test_table_shows_every_run(tasks: dict[str, Task]) -> None:
    console = Console(record=True, width=150, file=io.StringIO())
    console.print(report.table([*GOOD, result("digits", "hybrid", diverged="x")], tasks))
    text = console.export_text()
    for cell in ("loss 2.0100", "+0.50%", "accuracy 97.50%", "-0.50 points", "25.0 dB  blocks.0.up", "diverged"):
        assert cell in text


def test_results_json_has_no_nan(tmp_path: Path, tasks: dict[str, Task]) -> None:
    report.write_results(tmp_path / "results.json", GOOD, report.verdicts(GOOD, tasks, judge_quality=True), "cpu")
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert [row["recipe"] for row in found["results"]] == ["none", "hybrid", "none", "direct"]
    assert found["results"][0]["worst_sqnr"] is None
    assert [(row["recipe"], row["gaps"]) for row in found["comparisons"]] == [
        ("hybrid", pytest.approx([0.005])),
        ("direct", pytest.approx([0.5])),
    ]
    assert found["comparisons"][0]["standard_error"] is None
    assert all(bar["passed"] for bar in found["bars"])


def test_curves_are_a_picture(tmp_path: Path) -> None:
    artifacts.draw_curves(tmp_path / "curves.png", GOOD)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert artifacts.smoothed([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]


def test_plan_and_graphs_are_written(tmp_path: Path) -> None:
    fast = fp8fx.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "hybrid")
    fast(torch.randn(4, 8))
    artifacts.write_plan(tmp_path, "gpt-hybrid", fast)  # type: ignore[arg-type]
    artifacts.write_graphs(tmp_path / "graphs", "gpt-hybrid", fast)  # type: ignore[arg-type]
    assert "fp8" in (tmp_path / "gpt-hybrid-plan.txt").read_text()
    assert json.loads((tmp_path / "gpt-hybrid-plan.json").read_text())["recipe"] == "hybrid"
    assert "quantize(" in (tmp_path / "graphs/gpt-hybrid-2-insert_qdq.txt").read_text()
    assert len(list((tmp_path / "graphs").iterdir())) == len(artifacts.STAGES)


def test_progress_without_a_terminal_is_a_few_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file, progress(Console(file=file), "gpt / none", 100) as on_step:
        for step in range(100):
            on_step(step, 1.0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("step  100/100  loss 1.0000")
