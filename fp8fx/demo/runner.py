"""The demo from start to end: every model under every recipe, then the report.

A training run takes one core (`train.THREADS`), so on a CPU models can train side by side, each in a process of its own. Every run has its
own seed, and its figures are the same either way.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fp8fx.demo import artifacts, report
from fp8fx.demo.measure import measure
from fp8fx.demo.progress import progress
from fp8fx.demo.report import Verdict
from fp8fx.demo.results import BASELINE, Result
from fp8fx.demo.tasks import TASKS, Task
from fp8fx.demo.train import default_device, train
from fp8fx.errors import FP8Error, allowed, nearest

RECIPES = (BASELINE, "direct", "hybrid")
QUICK_STEPS = 12
NOTES = (
    "held-out, gap: means over the runs; a gap pairs runs of one seed, ± is the standard error of its mean",
    "SQNR: each layer alone, on one held-out batch: its output with rounded operands against without; the lowest of all runs",
)


def run(
    out: Path = Path("demo-out"),
    quick: bool = False,
    recipes: Sequence[str] = RECIPES,
    models: Sequence[str] = tuple(TASKS),
    steps: int | None = None,
    seed: int = 0,
    console: Console | None = None,
    processes: int = 1,
) -> int:
    """Train every model under every recipe, write the report into `out`, and return 0 if all bars pass, else 1.

    seed: that of the first run of each; a model with several runs per recipe (`Task.repeats`) takes the next ones too.
    quick: a few steps, to see that everything runs; `steps`: that many steps. Either way only divergence and coverage are judged,
    since a short run says nothing about quality.
    processes: how many models of a whole run train at once on a CPU. Each process imports the main module again: a script that asks for
    more than one needs `if __name__ == "__main__":`.
    Raises FP8Error for an unknown model or a missing extra.
    """
    console, start = console or Console(), time.perf_counter()
    shortened = steps if steps is not None else QUICK_STEPS if quick else None
    judged, chosen = shortened is None, _tasks(models, shortened)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"fp8fx demo: {', '.join(chosen)} under {', '.join(recipes)} on {default_device()}, seeds from {seed}", highlight=False)
    if judged and min(processes, len(chosen)) > 1 and default_device().type == "cpu":  # a short run ends before a process begins
        results = _side_by_side(list(chosen), shortened, recipes, seed, out, processes)
    else:
        results = [r for task in chosen.values() for recipe in recipes for r in _runs(task, recipe, seed, out, console)]
    checks = report.verdicts(results, chosen, judge_quality=judged)
    artifacts.draw_curves(out / "curves.png", results)
    report.write_results(out / "results.json", results, checks, str(default_device()))
    _show(console, report.table(results, chosen), checks, judged)
    spent = time.perf_counter() - start
    console.print(f"{spent:.0f} s in all; curves, plans, graphs and results.json are in {out}", highlight=False, soft_wrap=True)
    return 0 if all(check.passed for check in checks) else 1


def _tasks(models: Sequence[str], steps: int | None) -> dict[str, Task]:
    for name in models:
        if name not in TASKS:
            raise FP8Error(f"unknown demo model {name!r}: it can be {allowed(TASKS)}.{nearest(name, TASKS)}")
    return {name: TASKS[name]().with_steps(steps) for name in models}


def _side_by_side(models: Sequence[str], steps: int | None, recipes: Sequence[str], seed: int, out: Path, processes: int) -> list[Result]:
    """The results of `models`, in order. Progress is plain lines on stdout: bars of several processes would overwrite each other."""
    context = multiprocessing.get_context("spawn")  # a forked process would share the threads and locks of torch
    with ProcessPoolExecutor(min(processes, len(models)), mp_context=context) as pool:
        waiting = [pool.submit(_model, name, steps, recipes, seed, out) for name in models]
        return [r for each in waiting for r in each.result()]


def _model(name: str, steps: int | None, recipes: Sequence[str], seed: int, out: Path) -> list[Result]:
    """One model under every recipe, in this process."""
    (task,) = _tasks([name], steps).values()
    console = Console(force_terminal=False)
    return [r for recipe in recipes for r in _runs(task, recipe, seed, out, console)]


def _runs(task: Task, recipe: str, first_seed: int, out: Path, console: Console) -> Iterator[Result]:
    """Train and measure one model under one recipe, once per seed. Plan and graphs, equal for all seeds, are those of the first."""
    for seed in task.seeds(first_seed):
        title = f"{task.name} / {recipe}" + (f" / seed {seed}" if task.repeats > 1 else "")
        with progress(console, title, task.steps) as on_step:
            trained = train(task, recipe, seed, on_step=on_step)
        if trained.diverged:
            console.print(f"{title} {trained.diverged}", style="red", highlight=False)
        if seed == first_seed:
            artifacts.write_plan(out, f"{task.name}-{recipe}", trained.model)
            artifacts.write_graphs(out / "graphs", f"{task.name}-{recipe}", trained.model)
        yield measure(trained, task)


def _show(console: Console, table: Table, checks: list[Verdict], judged: bool) -> None:
    """The table, then one PASS or FAIL line per bar."""
    if console.is_terminal:
        console.print(table)
    else:  # a pipe has no width: do not fold the columns at 80 characters
        Console(file=console.file, width=max(console.width, 140)).print(table)
    for note in NOTES:
        console.print(note, highlight=False, soft_wrap=True)
    if not judged:
        console.print("a shortened run: quality is not judged", highlight=False)
    for check in checks:
        mark = "[green]PASS[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{mark}  {check.text}", highlight=False, soft_wrap=True)
