"""Warn where delayed scaling cannot do its work: each case once per model, and with what to do.

no step          training goes on, and no optimizer step was seen: the scales never move
no gradients     steps without a measured backward: torch.autograd.grad and backward(inputs=...) leave the meter out
eval() only      training in eval(), where scales stand still
unset scales     evaluation with scales that no step, calibration or checkpoint has set
"""

from __future__ import annotations

import warnings
from typing import Any

from fp8fx.errors import FP8Warning
from fp8fx.recipe import Recipe
from fp8fx.scaling import ScalingState

BACKWARDS = 256  # without an optimizer step: more than anyone accumulates

_NO_STEP = (
    f"fp8fx: {BACKWARDS} backward passes, and no optimizer has stepped that holds this model's parameters: delayed scales do not "
    "move. Call fp8fx.step(model) after each update of the weights (a hand-written update, master weights elsewhere, a frozen model), or "
    "use current scaling, such as recipe hybrid."
)
_NO_GRADIENTS = (
    "fp8fx: an optimizer stepped, and no backward was measured: torch.autograd.grad and backward(inputs=...) leave out what measures "
    "gradients, and their delayed scales do not move. Use loss.backward(), or current scaling for gradients "
    "(grad_output: {scaling: current})."
)
_EVAL_ONLY = (
    "fp8fx: the model trains in eval(), where delayed scales stand still: they will not follow the tensors. Call train() (layers such as "
    "dropout and batch norm can be put into eval() one by one), or use current scaling, such as recipe hybrid."
)
_UNSET = (
    "fp8fx: evaluation reads delayed scales that were never set: {names}. They are 1, and results may be far off. Train a step more, call "
    "the model under fp8fx.autocast(calibrating=True) first, or load a state that has them."
)


def underflow_advice(recipe: Recipe) -> str:
    """What to do about gradients that underflow under `recipe`."""
    if recipe.loss_scaling.mode == "none":
        return "Use a recipe that scales gradients, such as hybrid (grad_output: {scaling: current})."
    return f"Scale the loss with fp8fx.GradScaler(recipe={recipe.name!r}), or use a recipe that scales gradients, such as hybrid."


class ScalingWatch:
    """What a Runtime tells: forwards, backwards and optimizer steps of one model with delayed scales."""

    def __init__(self, scaling: ScalingState) -> None:
        self.scaling = scaling
        self.told: set[str] = set()
        self.backwards = 0  # since the last optimizer step
        self.trained = self.evaluated = False  # forwards with gradients since then, in train() and in eval()

    def forward(self, training: bool) -> None:
        """A forward with gradients."""
        self.trained |= training
        self.evaluated |= not training

    def backward(self) -> None:
        self.backwards += 1
        if len(self.scaling) and self.trained and self.backwards >= BACKWARDS:
            self._warn(_NO_STEP)

    def optimizer_stepped(self) -> None:
        if len(self.scaling) and self.evaluated and not self.trained:
            self._warn(_EVAL_ONLY)
        if self.trained and not self.backwards and any(slot.role.startswith("grad_") for slot in self.scaling.slots):
            self._warn(_NO_GRADIENTS)
        self.backwards, self.trained, self.evaluated = 0, False, False

    def evaluation(self, scales: Any) -> None:
        """A forward that records nothing reads the rows of `scales`."""
        unset = [slot for slot, row in zip(scales.slots, scales.rows, strict=True) if row not in self.scaling.settled]
        if unset and _UNSET not in self.told:
            names = ", ".join(f"{slot.site}.{slot.role}" for slot in unset[:3]) + (f" and {len(unset) - 3} more" if len(unset) > 3 else "")
            self._warn(_UNSET, names=names)

    def _warn(self, message: str, **values: str) -> None:
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message.format(**values) if values else message, FP8Warning, stacklevel=4)
