"""The files the demo leaves behind: loss curves, the plan, and the graph before and after every pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Protocol

from fp8fx.demo.results import Result, rows
from fp8fx.errors import FP8Error
from fp8fx.pipeline import STAGES
from fp8fx.show import listing

SMOOTH = 20  # steps a point of the drawn curve averages over


class Compiled(Protocol):
    """The part of a compiled model that is written down."""

    def plan(self) -> Any: ...

    def graph(self, stage: str) -> Any: ...


def write_plan(folder: Path, name: str, model: Compiled) -> None:
    """`<name>-plan.txt` and `<name>-plan.json`."""
    plan = model.plan()
    (folder / f"{name}-plan.txt").write_text(f"{plan}\n")
    (folder / f"{name}-plan.json").write_text(plan.to_json() + "\n")


def write_graphs(folder: Path, name: str, model: Compiled) -> None:
    """One text per stage, numbered in pipeline order: what a pass did is the difference between two neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(STAGES):
        (folder / f"{name}-{number}-{stage}.txt").write_text(listing(model.graph(stage=stage)))


def smoothed(losses: list[float], window: int = SMOOTH) -> list[float]:
    """Running mean over the last `window` values."""
    means = (losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in means]


def draw_curves(path: Path, results: list[Result]) -> None:
    """Training loss against step, one panel per model, one colour per recipe and one line per run, as a PNG."""
    try:
        import matplotlib
    except ImportError as error:
        raise FP8Error("the demo's picture needs matplotlib: pip install 'fp8fx[demo]'") from error
    matplotlib.use("Agg")  # no window system needed
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(r.task for r in results))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        groups = rows([r for r in results if r.task == task])
        for number, (style, runs) in enumerate(zip(itertools.cycle(("-", "--", ":")), groups)):
            for r in runs:
                label = r.recipe if r is runs[0] else None
                panel.plot(smoothed(r.losses), style, color=f"C{number}", label=label, linewidth=1.6 / len(runs) ** 0.5)
        panel.set(title=task, xlabel="step", ylabel=f"training loss, nats (mean of {SMOOTH} steps)")
        panel.set_yscale("log" if task == "digits" else "linear")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
