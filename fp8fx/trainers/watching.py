"""What the callbacks of all trainers share: the optimizer is checked once, the statistics follow the trainer's own count of steps."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from fp8fx.clone import runtimes_of
from fp8fx.errors import ModelError
from fp8fx.statistics import Statistics


def check_optimizers(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """ModelError if a compiled model in `model` has trainable parameters, and the optimizers hold none of them.

    They would train other tensors, and no step of FP8 state would ever end: scales and random bits stand still.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for path, module in model.named_modules():
        trainable = [p for p in module.parameters() if p.requires_grad] if runtimes_of(module) else []
        if trainable and not any(id(p) in held for p in trainable):
            where = f"the compiled model {path!r}" if path else "the compiled model"
            raise ModelError(
                f"the optimizer holds none of the {len(trainable)} trainable parameters of {where}: it was made for other tensors, those "
                "of a copy, or of a model before model.to(dtype) or a new assignment of its weights. Make the optimizer from the "
                "parameters of the model that trains; if the weights are updated in another way, call fp8fx.step(model) after each update"
            )


class Watching:
    """Statistics of one run of a trainer."""

    def __init__(self, jsonl: str | os.PathLike[str] | None, tensorboard: Any, every: int) -> None:
        self._arguments = (jsonl, tensorboard, every)
        self._statistics: Statistics | None = None

    def start(self, model: nn.Module, optimizers: Iterable[Any], step: int, writes: bool) -> None:
        """`step`: steps done before. `writes`: whether this process writes; all of them check."""
        self.stop()
        check_optimizers(model, optimizers)
        if writes:
            self._statistics = Statistics(model, *self._arguments, start=step)

    def step(self, number: int) -> None:
        if self._statistics is not None and number != self._statistics.number:
            self._statistics.step(number)

    def stop(self) -> None:
        if self._statistics is not None:
            self._statistics.close()
            self._statistics = None
