"""For accelerate, and for transformers.Trainer, which trains through it.

accelerator = Accelerator()
use_scaler(accelerator, fp8fx.GradScaler(recipe))     # before prepare; a pass-through where the recipe needs none
fast, optimizer = accelerator.prepare(fp8fx.compile(model, recipe), optimizer)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import fp8fx
from fp8fx.clone import runtime_of
from fp8fx.errors import ModelError
from fp8fx.loss_scaling import GradScaler


def use_scaler(accelerator: Any, scaler: GradScaler) -> None:
    """Let an Accelerator, or a transformers.Trainer, scale the loss by `scaler`, and save and restore it with its checkpoints.

    Accelerate makes a scaler for float16 only, and unscales gradients before they are clipped for that one only; this one is unscaled too.
    Raises ModelError for a scaler of another kind, after `prepare`, and where mixed_precision="fp16" has brought a scaler.
    """
    accelerator = getattr(accelerator, "accelerator", accelerator)
    if not isinstance(scaler, GradScaler):
        raise ModelError(f"use_scaler takes an fp8fx.GradScaler(recipe), got {type(scaler).__name__}")
    if accelerator.scaler is not None:
        raise ModelError(
            "this Accelerator has a scaler already (mixed_precision='fp16', or use_scaler before). Use mixed_precision='no' or 'bf16' with "
            "fp8fx.GradScaler"
        )
    if accelerator._optimizers:
        raise ModelError("use_scaler comes before accelerator.prepare (and before trainer.train): the optimizer it wrapped has no scaler")
    if not scaler.is_enabled():
        return
    accelerator.scaler = scaler

    def unscale_gradients(optimizer: Any = None) -> None:
        chosen = accelerator._optimizers if optimizer is None else optimizer
        for each in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
            while hasattr(each, "optimizer"):  # accelerate's own wrapper
                each = each.optimizer
            scaler.unscale_(each)

    accelerator.unscale_gradients = unscale_gradients


class FP8State:
    """The FP8 state of a compiled model as an object for `accelerator.register_for_checkpointing`."""

    def __init__(self, fast: nn.Module) -> None:
        self._fast = fast

    def state_dict(self) -> dict[str, Tensor]:
        return fp8fx.state_dict(self._fast)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        fp8fx.load_state_dict(self._fast, state)


def separate_state(accelerator: Any, fast: nn.Module) -> None:
    """Let `accelerator.save_state` write the model's file with the model's own entries only, and the FP8 state into a file of its own.

    The model's file is then an ordinary checkpoint, for any program; `accelerator.load_state` reads both. `fast` is what fp8fx.compile
    returned, before `prepare`. Call it in the program that loads too: accelerate finds registered objects by their order.
    Raises ModelError for a model that is not compiled.
    """
    if runtime_of(fast) is None:
        raise ModelError("separate_state takes the model that fp8fx.compile returned, before accelerator.prepare")

    def strip(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        for index, model in enumerate(models):
            if index < len(weights) and any(module is fast for module in model.modules()):
                weights[index] = fp8fx.strip(weights[index])

    accelerator.register_save_state_pre_hook(strip)
    accelerator.register_for_checkpointing(FP8State(fast))
