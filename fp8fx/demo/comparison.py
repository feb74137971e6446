"""A recipe against `none`: the mean of paired differences, and the standard error of that mean.

Runs are paired by seed: both of a pair have the same initial weights, batches and held-out data, so that what these do to the held-out
quality cancels and the recipe's part is left. What does not cancel is chance. Once a single rounding differs, two trainings part, and
end with a few other pictures wrong; another order of a sum is enough. That is why a bar on accuracy is put on a mean over seeds.

    gap_s = quality of `none` with seed s - quality of the recipe with seed s
    mean  = (1/n) sum_s gap_s
    standard error = sqrt(sum_s (gap_s - mean)^2 / (n - 1)) / sqrt(n)

The standard error takes the pairs as independent. Folds of a cross-validation share training pictures and are not quite: it is then
a little too small. With few pairs it is itself a rough estimate. It is shown beside the bar and plays no part in PASS or FAIL.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fp8fx.demo.results import BASELINE, Result, of


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much worse than `none`: a share of its loss, or points of a hundred for an accuracy.

    gaps: one per seed. `mean` is NaN where a run is missing or diverged; `standard_error` is NaN for fewer than two pairs.
    """

    task: str
    metric: str
    recipe: str
    seeds: tuple[int, ...]
    gaps: tuple[float, ...]
    mean: float
    standard_error: float


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent `values`; NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def gap(result: Result, base: Result) -> float:
    """How much worse than `base`, its pair, `result` is."""
    if result.metric == "loss":
        return result.held_out_loss / base.held_out_loss - 1
    return 100 * (base.accuracy - result.accuracy)


def compare(results: list[Result], task: str, recipe: str) -> Comparison:
    """`recipe` against `none` over all seeds of `task`."""
    base = {r.seed: r for r in of(results, task, BASELINE)}
    runs = of(results, task, recipe)
    gaps = tuple(gap(r, base[r.seed]) if r.seed in base else math.nan for r in runs)
    whole = bool(gaps) and all(map(math.isfinite, gaps))  # a diverged run has no quality: its gap is NaN
    return Comparison(
        task=task,
        metric=runs[0].metric,
        recipe=recipe,
        seeds=tuple(r.seed for r in runs),
        gaps=gaps,
        mean=statistics.fmean(gaps) if whole else math.nan,
        standard_error=standard_error(gaps) if whole else math.nan,
    )


def gap_text(found: Comparison) -> str:
    """The mean gap with its sign, its standard error where there is one, and the unit; `-` for the baseline itself."""
    if math.isnan(found.mean) or found.recipe == BASELINE:
        return "-"
    loss, error = found.metric == "loss", found.standard_error
    # + 0.0 makes a rounded -0.0 a 0.0
    mean = f"{round(found.mean, 4) + 0.0:+.2%}" if loss else f"{round(-found.mean, 2) + 0.0:+.2f}"
    spread = "" if math.isnan(error) else f" ± {error:.2%}" if loss else f" ± {error:.2f}"
    return mean + spread + ("" if loss else " points")
