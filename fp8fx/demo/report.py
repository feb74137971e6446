"""What the demo found, as a table, as PASS or FAIL against the bars, and as `results.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fp8fx.demo.comparison import Comparison, compare, gap_text
from fp8fx.demo.results import BASELINE, Result, of, rows
from fp8fx.demo.tasks import Task

COVERAGE_BAR = 0.95  # of the FLOPs that the recipe does not exempt
COLUMNS = ("model", "recipe", "runs", "held-out", "gap to none", "bar", "FLOPs in FP8", "worst layer's SQNR", "time")
LEFT = ("model", "recipe", "worst layer's SQNR")


def table(results: list[Result], tasks: dict[str, Task]) -> Table:
    """One row per model and recipe: means over its seeds, the lowest coverage and SQNR of them, and the time of all."""
    out = Table(title="fp8fx demo", title_justify="left")
    for name in COLUMNS:
        out.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
    for runs in rows(results):
        first = runs[0]
        if any(r.diverged for r in runs):
            quality, gap = "[red]diverged[/]", "-"
        else:
            quality, gap = _quality(runs), gap_text(compare(results, first.task, first.recipe))
        share, seconds = min(r.fp8_share for r in runs), sum(r.seconds for r in runs)
        bar = tasks[first.task].bars.get(first.recipe)
        asked = "-" if bar is None else _bar_text(first.metric, bar)
        cells = (str(len(runs)), quality, gap, asked, f"{share:.1%}", _worst_layer(runs), f"{seconds:.1f} s")
        out.add_row(first.task, first.recipe, *cells)
    return out


def _bar_text(metric: str, bar: float) -> str:
    return f"{bar:.0%}" if metric == "loss" else f"{bar:g} point{'' if bar == 1 else 's'}"


def _quality(runs: list[Result]) -> str:
    if runs[0].metric == "loss":
        return f"loss {statistics.fmean(r.held_out_loss for r in runs):.4f}"
    return f"accuracy {statistics.fmean(r.accuracy for r in runs):.2%}"


def _worst_layer(runs: list[Result]) -> str:
    measured = [r for r in runs if r.worst_layer]
    if not measured:
        return "-"
    worst = min(measured, key=lambda r: (not math.isnan(r.worst_sqnr), r.worst_sqnr))  # NaN counts as lowest
    return f"{worst.worst_sqnr:.1f} dB  {worst.worst_layer}"


@dataclass(frozen=True)
class Verdict:
    """One bar: what was asked, what was found."""

    passed: bool
    text: str


def _quality_verdict(found: Comparison, runs: list[Result], base: list[Result], bar: float) -> Verdict:
    what = f"{found.task} {found.recipe}"
    broken = next((r for r in runs if r.diverged), None)
    if broken is not None:
        return Verdict(False, f"{what}: {broken.diverged} (seed {broken.seed})")
    if math.isnan(found.mean):
        lost = "diverged" if any(r.diverged for r in base) else "is missing"
        return Verdict(False, f"{what}: nothing to compare with, a {BASELINE} run {lost}")
    several = f" (mean of {len(runs)} runs ± standard error)" if len(runs) > 1 else ""
    quantity = "held-out loss" if found.metric == "loss" else "accuracy"
    text = f"{what}: {quantity} {gap_text(found)}{several}, asked within {_bar_text(found.metric, bar)} of {BASELINE}"
    return Verdict(found.mean <= bar, text)


def verdicts(results: list[Result], tasks: dict[str, Task], judge_quality: bool) -> list[Verdict]:
    """The bars of every FP8 recipe. Without `judge_quality` (a run cut short) only divergence and coverage count."""
    out: list[Verdict] = []
    for runs in rows(results):
        task, recipe = runs[0].task, runs[0].recipe
        bar = tasks[task].bars.get(recipe)
        if bar is None or not judge_quality:
            out += [Verdict(False, f"{task} {recipe}: {r.diverged} (seed {r.seed})") for r in runs if r.diverged]
        if bar is None:
            continue
        if judge_quality:
            out.append(_quality_verdict(compare(results, task, recipe), runs, of(results, task, BASELINE), bar))
        share = min(r.fp8_share for r in runs)
        text = f"{task} {recipe}: {share:.1%} of non-exempt FLOPs in FP8, asked at least {COVERAGE_BAR:.0%}"
        out.append(Verdict(share >= COVERAGE_BAR, text))
    return out


def write_results(path: Path, results: list[Result], checks: list[Verdict], device: str) -> None:
    """`results.json`: every run with its loss curve, comparisons, verdicts, and what it ran on. NaN becomes null."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    compared = [compare(results, runs[0].task, runs[0].recipe) for runs in rows(results) if runs[0].recipe != BASELINE]
    found = {
        "device": device,
        "versions": versions,
        "results": [dataclasses.asdict(r) for r in results],
        "comparisons": [dataclasses.asdict(c) for c in compared],
        "bars": [dataclasses.asdict(v) for v in checks],
    }
    path.write_text(json.dumps(_finite(found), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
