"""The demo from start to end with several seeds, and its exit code."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_results import seeds
from rich.console import Console

from fp8fx import demo
from fp8fx.demo import runner
from fp8fx.demo.results import Result
from fp8fx.demo.tasks import Task, digits
from fp8fx.errors import FP8Error


def test_every_seed_is_trained_on_its_own_fold_and_the_same_twice(tmp_path: Path) -> None:
    task = dataclasses.replace(digits(batch=16).with_steps(2), repeats=3)
    quiet = Console(file=io.StringIO())
    first, again = (list(runner._runs(task, "none", 1, tmp_path, quiet)) for _ in range(2))
    assert [r.seed for r in first] == [1, 2, 3]
    assert len({r.losses[0] for r in first}) == 3
    assert [(r.losses, r.accuracy) for r in again] == [(r.losses, r.accuracy) for r in first]
    assert [path.name for path in tmp_path.glob("*-plan.txt")] == ["digits-none-plan.txt"]
    (alone,) = runner._runs(dataclasses.replace(task, repeats=1), "none", 3, tmp_path, quiet)
    assert alone.losses == first[2].losses


@pytest.mark.parametrize(("worst", "code", "mark"), [(0.975, 0, "PASS"), (0.965, 1, "FAIL")])
def test_the_mean_decides_what_is_printed_and_the_exit_code(
    worst: float, code: int, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = {"none": [0.99, 0.99, 0.99], "direct": [worst, 0.98, 0.99]}

    def fake(task: Task, recipe: str, *_: object) -> Iterator[Result]:
        yield from seeds(task.name, recipe, accuracies[recipe])

    monkeypatch.setattr(runner, "_runs", fake)
    with (tmp_path / "log").open("w") as log:
        assert demo.run(tmp_path / "out", recipes=("none", "direct"), models=("digits",), console=Console(file=log)) == code
    lines = (tmp_path / "log").read_text().splitlines()
    mean = {"PASS": "-0.83 ± 0.44", "FAIL": "-1.17 ± 0.73"}[mark]
    expected = f"{mark}  digits direct: accuracy {mean} points (mean of 3 runs ± standard error), asked within 1 point of none"
    assert expected in lines
    (row,) = [line for line in lines if "direct" in line and "accuracy" in line and not line.startswith(mark)]
    assert f"{mean} points" in row


def test_models_side_by_side_give_what_they_give_alone(tmp_path: Path) -> None:
    """Each in a process of its own, in the order asked for; what goes wrong in one is raised here."""
    names, quiet, folders = ["gpt", "digits"], Console(file=io.StringIO()), [tmp_path / "both", tmp_path / "alone"]
    for folder in folders:
        folder.mkdir()
    found = runner._side_by_side(names, 2, ["none"], 0, folders[0], 2)
    tasks = runner._tasks(names, 2)
    alone = [r for task in tasks.values() for r in runner._runs(task, "none", 0, folders[1], quiet)]
    assert [(r.task, r.seed, r.losses, r.held_out_loss) for r in found] == [(r.task, r.seed, r.losses, r.held_out_loss) for r in alone]
    made, expected = (sorted(path.name for path in folder.rglob("*")) for folder in folders)
    assert made == expected
    with pytest.raises(FP8Error, match="no-such-recipe"):
        runner._side_by_side(["gpt"], 2, ["no-such-recipe"], 0, tmp_path, 2)


@pytest.mark.parametrize(("options", "beside"), [({"processes": 2}, True), ({}, False), ({"processes": 2, "quick": True}, False)])
def test_when_models_train_side_by_side(options: dict[str, Any], beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where more than one process is asked for, and in a whole run."""
    asked: list[tuple[str, ...]] = []

    def side_by_side(models: list[str], *_: object) -> list[Result]:
        asked.append(tuple(models))
        return [r for name in models for r in seeds(name, "none", [0.99])]

    monkeypatch.setattr(runner, "_side_by_side", side_by_side)
    monkeypatch.setattr(runner, "_runs", lambda task, *_: iter(seeds(task.name, "none", [0.99])))
    demo.run(tmp_path, recipes=("none",), console=Console(file=io.StringIO()), **options)
    assert asked == ([("gpt", "digits")] if beside else [])
