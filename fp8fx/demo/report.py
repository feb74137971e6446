"""What the demo found, as a table, as PASS or FAIL against the bars, and as `results.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fp8fx.demo.tasks import Task

COVERAGE_BAR = 0.95  # of the FLOPs that the recipe does not exempt
BASELINE = "none"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table. `fp8_share` is of non-exempt FLOPs, `exempt_share` of all FLOPs; SQNR in dB."""

    task: str
    metric: str
    recipe: str
    seed: int
    steps: int
    held_out_loss: float
    accuracy: float
    seconds: float
    diverged: str
    fp8_share: float
    exempt_share: float
    worst_layer: str
    worst_sqnr: float
    losses: list[float]
    sqnr: dict[str, float]


def baseline(results: list[Result], task: str) -> Result | None:
    """The run of `task` that the others are compared with."""
    return next((r for r in results if r.task == task and r.recipe == BASELINE), None)


def gap(result: Result, base: Result | None) -> float:
    """How much worse than `base`: a share of its loss, or points of a hundred for an accuracy; NaN without a baseline."""
    if base is None:
        return math.nan
    if result.metric == "loss":
        return result.held_out_loss / base.held_out_loss - 1
    return 100 * (base.accuracy - result.accuracy)


def gap_text(result: Result, base: Result | None) -> str:
    """The gap with its sign and unit."""
    value = gap(result, base)
    if math.isnan(value) or result is base:
        return "-"
    # + 0.0 makes a rounded -0.0 a 0.0
    return f"{round(value, 4) + 0.0:+.2%}" if result.metric == "loss" else f"{round(-value, 2) + 0.0:+.2f} points"


def table(results: list[Result]) -> Table:
    """One row per training run."""
    out = Table(title="fp8fx demo", title_justify="left")
    for name in ("model", "recipe", "held-out", "gap to none", "FLOPs in FP8", "worst layer's SQNR", "time"):
        out.add_column(name, justify="left" if name in ("model", "recipe", "worst layer's SQNR") else "right", overflow="fold")
    for r in results:
        quality = f"loss {r.held_out_loss:.4f}" if r.metric == "loss" else f"accuracy {r.accuracy:.2%}"
        layer = f"{r.worst_sqnr:.1f} dB  {r.worst_layer}" if r.worst_layer else "-"
        cells = (quality, gap_text(r, baseline(results, r.task)), f"{r.fp8_share:.1%}", layer, f"{r.seconds:.1f} s")
        out.add_row(r.task, r.recipe, *(("[red]diverged[/]", "-", *cells[2:]) if r.diverged else cells))
    return out


@dataclass(frozen=True)
class Verdict:
    """One bar: what was asked, what was found."""

    passed: bool
    text: str


def _quality_verdict(result: Result, base: Result | None, bar: float) -> Verdict:
    what = f"{result.task} {result.recipe}"
    if result.diverged:
        return Verdict(False, f"{what}: {result.diverged}")
    if base is None or base.diverged:
        return Verdict(False, f"{what}: nothing to compare with, the {BASELINE} run is missing or diverged")
    asked = f"within {bar:.0%} of none" if result.metric == "loss" else f"within {bar:g} point of none"
    quantity = "held-out loss" if result.metric == "loss" else "accuracy"
    return Verdict(gap(result, base) <= bar, f"{what}: {quantity} {gap_text(result, base)}, asked {asked}")


def verdicts(results: list[Result], tasks: dict[str, Task], judge_quality: bool) -> list[Verdict]:
    """The bars of every FP8 run. Without `judge_quality` (a run cut short) only divergence and coverage count."""
    out: list[Verdict] = []
    for r in results:
        bar = tasks[r.task].bars.get(r.recipe)
        if r.diverged and (bar is None or not judge_quality):
            out.append(Verdict(False, f"{r.task} {r.recipe}: {r.diverged}"))
        if bar is None:
            continue
        if judge_quality:
            out.append(_quality_verdict(r, baseline(results, r.task), bar))
        share = f"{r.task} {r.recipe}: {r.fp8_share:.1%} of non-exempt FLOPs in FP8, asked at least {COVERAGE_BAR:.0%}"
        out.append(Verdict(r.fp8_share >= COVERAGE_BAR, share))
    return out


def write_results(path: Path, results: list[Result], checks: list[Verdict], device: str) -> None:
    """`results.json`: every row with its loss curve, the verdicts, and what it ran on. NaN becomes null."""
    rows = [dataclasses.asdict(r) | {"gap_to_none": gap(r, baseline(results, r.task))} for r in results]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    found = {"device": device, "versions": versions, "results": rows, "bars": [dataclasses.asdict(v) for v in checks]}
    path.write_text(json.dumps(_finite(found), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
