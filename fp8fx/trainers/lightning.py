"""For Lightning: a LightningModule that holds `fp8fx.compile(model, recipe)` as a submodule.

Trainer(plugins=[LossScaling(recipe)], callbacks=[StatisticsCallback(jsonl="fp8.jsonl")])
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision

from fp8fx.compile import RecipeLike
from fp8fx.loss_scaling import GradScaler
from fp8fx.trainers.watching import Watching


class LossScaling(MixedPrecision):
    """Lightning's loss scaling with a recipe's fp8fx.GradScaler, and without its autocast; a pass-through where the recipe needs none.

    Its state is part of Lightning's checkpoints. device: as for fp8fx.GradScaler.
    """

    def __init__(self, recipe: RecipeLike, device: str | None = None) -> None:
        scaler = GradScaler(recipe, device)
        super().__init__("16-mixed", scaler._device, scaler)
        self.precision = "32-true"  # what Lightning is told: nothing is cast
        if not scaler.is_enabled():
            self.scaler = None

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class StatisticsCallback(pl.Callback):
    """fp8fx.Statistics of the compiled models in the LightningModule, by the trainer's global_step; written by the first process.

    The arguments are those of fp8fx.Statistics.
    Training does not start (ModelError) if the optimizers hold none of the model's parameters.
    """

    def __init__(self, jsonl: str | os.PathLike[str] | None = None, tensorboard: Any = None, every: int = 100) -> None:
        self._watching = Watching(jsonl, tensorboard, every)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._watching.start(pl_module, trainer.optimizers, trainer.global_step, trainer.is_global_zero)

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self._watching.step(trainer.global_step)  # stands still while gradients accumulate

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._watching.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._watching.stop()
