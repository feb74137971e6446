from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fp8fx
from fp8fx import demo
from fp8fx.demo.tasks import TASKS, Task, digits, gpt
from fp8fx.demo.train import Run, train
from fp8fx.errors import FP8Error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {"gpt": gpt(held_out_batches=8).with_steps(10), "digits": digits(batch=32).with_steps(12)}


@pytest.fixture(scope="module")
def runs(tasks: dict[str, Task]) -> dict[tuple[str, str], Run]:
    return {(name, recipe): train(task, recipe, device=CPU) for name, task in tasks.items() for recipe in demo.RECIPES}


@pytest.mark.parametrize("recipe", demo.RECIPES)
@pytest.mark.parametrize("name", list(TASKS))
def test_losses_fall_and_the_held_out_data_is_evaluated(runs: dict[tuple[str, str], Run], name: str, recipe: str) -> None:
    run = runs[name, recipe]
    assert run.diverged == ""
    assert sum(run.losses[-3:]) / 3 < 0.93 * run.losses[0]
    assert math.isfinite(run.held_out_loss)
    assert 0 < run.accuracy < 1


@pytest.mark.parametrize(("name", "recipe"), [("gpt", "none"), ("digits", "direct")])
def test_two_runs_are_equal_bit_for_bit(runs: dict[tuple[str, str], Run], tasks: dict[str, Task], name: str, recipe: str) -> None:
    again = train(tasks[name], recipe, device=CPU)
    first = runs[name, recipe]
    assert again.losses == first.losses
    assert (again.held_out_loss, again.accuracy) == (first.held_out_loss, first.accuracy)


def test_recipes_start_from_the_same_weights_and_fp8_changes_the_numbers(runs: dict[tuple[str, str], Run]) -> None:
    firsts = [runs["gpt", recipe].losses[0] for recipe in demo.RECIPES]
    assert max(firsts) - min(firsts) < 0.05
    assert len(set(firsts)) == len(firsts)


def test_the_compiled_model_shares_its_parameters_with_the_plain_one(runs: dict[tuple[str, str], Run]) -> None:
    run = runs["digits", "hybrid"]
    assert [id(p) for p in run.model.parameters()] == [id(p) for p in run.source.parameters()]
    assert fp8fx.unwrap(run.model) is run.source


class Exploding(nn.Module):
    """A scalar whose loss is not a number from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.weight.expand(len(x), 10) * (1 if self.calls == 1 else math.nan)


def test_divergence_ends_the_run_with_a_message(tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8fx, "compile", lambda model, recipe, **options: model)
    run = train(dataclasses.replace(tasks["digits"], build=Exploding), "none", device=CPU)
    assert run.diverged == "diverged at step 1: the loss is nan"
    assert len(run.losses) == 2
    assert math.isnan(run.held_out_loss)


def test_the_thread_count_is_put_back(tasks: dict[str, Task]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(tasks["digits"].with_steps(1), "none", device=CPU)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_a_short_demo_writes_everything_and_passes(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert demo.run(tmp_path / "out", steps=2, recipes=("none", "hybrid"), models=("digits",), console=Console(file=log)) == 0
    text = (tmp_path / "log").read_text()
    assert "PASS" in text
    assert "FAIL" not in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"curves.png", "results.json", "graphs", "digits-hybrid-plan.txt", "digits-hybrid-plan.json"} <= names
    assert len(list((tmp_path / "out" / "graphs").glob("digits-hybrid-*.txt"))) == 6


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FP8Error, match=r"'digit'.*gpt or digits.*Did you mean 'digits'"):
        demo.run(tmp_path, models=("digit",))
