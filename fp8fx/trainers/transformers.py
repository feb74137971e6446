"""For transformers.Trainer: `Trainer(model=fp8fx.compile(model, recipe), callbacks=[StatisticsCallback(...)])`."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from fp8fx.trainers.accelerate import use_scaler
from fp8fx.trainers.watching import Watching

__all__ = ["StatisticsCallback", "use_scaler"]


class StatisticsCallback(TrainerCallback):
    """fp8fx.Statistics of the trainer's model, by the trainer's global_step; written by the first process.

    The arguments are those of fp8fx.Statistics.
    Training does not start (ModelError) if the optimizer holds none of the model's parameters.
    """

    def __init__(self, jsonl: str | os.PathLike[str] | None = None, tensorboard: Any = None, every: int = 100) -> None:
        self._watching = Watching(jsonl, tensorboard, every)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self._watching.start(model, [] if optimizer is None else [optimizer], state.global_step, state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watching.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watching.stop()
