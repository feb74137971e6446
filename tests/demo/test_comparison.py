"""The mean of paired differences and its standard error, and the bar on that mean."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from demo_results import result, seeds
from rich.console import Console
from sklearn.datasets import load_digits

from fp8fx.demo import report
from fp8fx.demo.comparison import compare, gap_text, standard_error
from fp8fx.demo.results import rows
from fp8fx.demo.tasks import TASKS, Task

NONE = [0.99, 0.98, 1.00]
# 1.5, 0.5 and 0.4 points below: a mean of 0.8, deviations 0.7, -0.3, -0.4, standard error sqrt(0.74 / 2) / sqrt(3).
NEAR = [0.975, 0.975, 0.996]
FAR = [0.975, 0.960, 0.996]  # 1.5, 2.0 and 0.4 points: a mean of 1.3


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {"digits": TASKS["digits"]()}


def test_mean_and_standard_error_of_paired_differences() -> None:
    found = compare([*seeds("digits", "none", NONE), *seeds("digits", "direct", NEAR)], "digits", "direct")
    assert found.seeds == (0, 1, 2)
    assert found.gaps == pytest.approx((1.5, 0.5, 0.4))
    assert found.mean == pytest.approx(0.8)
    assert found.standard_error == pytest.approx(math.sqrt(0.74 / 2 / 3))
    assert gap_text(found) == "-0.80 ± 0.35 points"


def test_runs_pair_by_seed_whatever_their_order() -> None:
    none, direct = seeds("digits", "none", NONE), seeds("digits", "direct", NEAR)
    assert compare([*direct[::-1], *none], "digits", "direct").gaps == pytest.approx((0.4, 0.5, 1.5))


def test_what_the_seed_does_to_both_of_a_pair_cancels() -> None:
    runs = [*seeds("digits", "none", [0.90, 0.95, 1.00]), *seeds("digits", "direct", [0.89, 0.94, 0.99])]
    found = compare(runs, "digits", "direct")
    assert (found.mean, found.standard_error) == pytest.approx((1.0, 0.0))


def test_a_loss_is_compared_as_a_share_of_that_of_its_pair() -> None:
    none = [result("gpt", "none", loss=loss, seed=seed) for seed, loss in enumerate((2.0, 4.0))]
    found = compare([*none, *(result("gpt", "direct", loss=loss, seed=seed) for seed, loss in enumerate((2.02, 4.0)))], "gpt", "direct")
    assert found.gaps == pytest.approx((0.01, 0.0))
    assert gap_text(found) == "+0.50% ± 0.50%"


def test_one_run_has_no_standard_error() -> None:
    assert math.isnan(standard_error([1.0]))
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert gap_text(compare([result("digits", "none"), result("digits", "direct", accuracy=0.97)], "digits", "direct")) == "-1.00 points"


def test_a_missing_or_diverged_pair_leaves_no_mean() -> None:
    none, direct = seeds("digits", "none", NONE), seeds("digits", "direct", NEAR)
    lost = dataclasses.replace(direct[1], diverged="diverged at step 1", accuracy=math.nan)
    for runs in ([*none[:2], *direct], [*none, direct[0], lost, direct[2]]):
        found = compare(runs, "digits", "direct")
        assert math.isnan(found.mean)
        assert math.isnan(found.standard_error)
        assert gap_text(found) == "-"


def test_the_bar_is_on_the_mean(tasks: dict[str, Task]) -> None:
    none = seeds("digits", "none", NONE)
    near, _ = report.verdicts([*none, *seeds("digits", "direct", NEAR)], tasks, judge_quality=True)
    assert near.passed  # though one of its runs is 1.5 points below
    assert near.text == "digits direct: accuracy -0.80 ± 0.35 points (mean of 3 runs ± standard error), asked within 1 point of none"
    far, _ = report.verdicts([*none, *seeds("digits", "direct", FAR)], tasks, judge_quality=True)
    assert not far.passed
    assert "accuracy -1.30 ± 0.47 points" in far.text


def test_a_large_standard_error_excuses_nothing(tasks: dict[str, Task]) -> None:
    runs = [*seeds("digits", "none", [1.0, 1.0, 1.0]), *seeds("digits", "direct", [1.0, 1.0, 0.969])]
    verdict, _ = report.verdicts(runs, tasks, judge_quality=True)
    assert "-1.03 ± 1.03 points" in verdict.text
    assert not verdict.passed


def test_one_diverged_run_of_several_fails_its_recipe(tasks: dict[str, Task]) -> None:
    direct = seeds("digits", "direct", NONE)
    direct[2] = dataclasses.replace(direct[2], diverged="diverged at step 1: the loss is nan", accuracy=math.nan)
    failed = [v.text for v in report.verdicts([*seeds("digits", "none", NONE), *direct], tasks, judge_quality=True) if not v.passed]
    assert failed == ["digits direct: diverged at step 1: the loss is nan (seed 2)"]


def test_the_lowest_coverage_of_the_runs_is_judged(tasks: dict[str, Task]) -> None:
    direct = seeds("digits", "direct", NONE)
    direct[1] = dataclasses.replace(direct[1], fp8_share=0.9)
    _, share = report.verdicts([*seeds("digits", "none", NONE), *direct], tasks, judge_quality=True)
    assert not share.passed
    assert "90.0%" in share.text


def test_the_table_has_a_row_per_recipe_with_means_beside_the_bar(tasks: dict[str, Task]) -> None:
    runs = [*seeds("digits", "none", NONE), *seeds("digits", "direct", NEAR)]
    assert [len(group) for group in rows(runs)] == [3, 3]
    console = Console(record=True, width=150, file=io.StringIO())
    console.print(report.table(runs, tasks))
    text = console.export_text()
    assert text.count("digits") == 2
    for cell in ("accuracy 99.00%", "accuracy 98.20%", "-0.80 ± 0.35 points │ 1 point", "3.0 s"):
        assert cell in text


def test_seeds_one_after_the_other_hold_out_every_picture_once(tasks: dict[str, Task]) -> None:
    task = tasks["digits"]
    for first in (0, 4):
        held_out = torch.cat([pictures for seed in task.seeds(first) for pictures, _ in task.held_out(seed)])
        assert len(held_out) == 1797
        assert len(held_out.flatten(1).unique(dim=0)) == len(torch.from_numpy(load_digits().images).flatten(1).unique(dim=0))


def test_a_shortened_run_is_trained_once(tasks: dict[str, Task]) -> None:
    assert list(tasks["digits"].with_steps(2).seeds(5)) == [5]
    assert list(tasks["digits"].with_steps(None).seeds(5)) == [5, 6, 7]
