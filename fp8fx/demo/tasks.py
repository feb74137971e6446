"""What the demo trains: a model, its real input and its settings, as one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fp8fx.demo import data
from fp8fx.demo.models import GPT, DigitsResNet

FOLDS = 3  # of the digits: a third of the pictures is held out in each
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training job. The numbers are tuned for two CPU cores; `lr` decays to a tenth over the run (cosine).

    metric: what is compared between recipes, `loss` (held-out cross entropy in nats) or `accuracy` (held-out share right).
    bars: per recipe, how much worse than `none` it may be: relative for a loss, in points of a hundred for an accuracy.
    repeats: runs per recipe, each with a seed of its own; the bars are on the mean over them.
    """

    name: str
    metric: str
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], Batches]  # (steps, seed) -> training batches
    held_out: Callable[[int], Batches]  # (seed) -> held-out batches
    steps: int
    lr: float
    weight_decay: float
    bars: dict[str, float]
    warmup: int = 20
    repeats: int = 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over every position."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def with_steps(self, steps: int | None) -> Task:
        """The same task for `steps` steps, once per recipe since a run cut short is not judged; None changes nothing."""
        if steps is None:
            return self
        return dataclasses.replace(self, steps=steps, warmup=min(self.warmup, max(steps // 4, 1)), repeats=1)

    def seeds(self, first: int) -> range:
        """The seeds of its runs."""
        return range(first, first + self.repeats)


def gpt(context: int = 64, batch: int = 8, held_out_batches: int = 128) -> Task:
    """A byte-level GPT on Python's own standard library."""
    text = data.python_source()
    return Task(
        name="gpt",
        metric="loss",
        build=lambda: GPT(width=128, layers=2, heads=4, context=context),
        batches=lambda steps, seed: data.text_batches(text.train, batch, context, steps, seed),
        held_out=lambda _: data.text_windows(text.held_out, batch, context, held_out_batches),
        steps=600,
        lr=3e-3,
        weight_decay=0.1,
        bars={"hybrid": 0.01, "delayed": 0.01, "rowwise": 0.01, "blockwise": 0.01, "direct": 0.03},
    )


def digits(batch: int = 64) -> Task:
    """A small ResNet on scikit-learn's handwritten digits, by cross-validation: every picture is held out once.

    A run's seed chooses weights, order of the data and fold: seeds one after the other go through all folds.
    """
    folds = [data.digits(fold, FOLDS) for fold in range(FOLDS)]
    return Task(
        name="digits",
        metric="accuracy",
        build=lambda: DigitsResNet(width=32),
        batches=lambda steps, seed: data.picture_batches(folds[seed % FOLDS], batch, steps, seed),
        held_out=lambda seed: data.picture_windows(folds[seed % FOLDS], 100),
        steps=200,
        lr=3e-3,
        weight_decay=0.05,
        bars={"hybrid": 1.0, "delayed": 1.0, "rowwise": 1.0, "blockwise": 1.0, "direct": 1.0},
        repeats=FOLDS,
    )


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "digits": digits}
