"""GradScaler: torch's own dynamic loss scaler, set up by a recipe, with a minimum scale that rises on a schedule.

FP8 gradients without scales of their own need a loss scale that stays up: ResNet-50 trained with a minimum of about 10k, GNMT
with 8K from iteration 40k and 32K from 150k (arXiv 1905.12334). A recipe says so as `minimum: {0: 1, 40000: 8192}`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.compile import RecipeLike
from fp8fx.errors import ModelError
from fp8fx.recipe import Recipe


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with the recipe's `loss_scaling`; a pass-through where that is `{mode: none}`.

    recipe: as for `fp8fx.compile`. device: "cuda" or "cpu"; by default cuda where there is one. Keyword arguments of
    torch.amp.GradScaler (init_scale, growth_factor, backoff_factor, growth_interval, enabled) override the recipe's.
    """

    def __init__(self, recipe: RecipeLike = "hybrid", device: str | None = None, **torch_kwargs: Any) -> None:
        loaded = Recipe.load(recipe)
        scaling = loaded.loss_scaling
        fixed = scaling.mode == "static"
        settings: dict[str, Any] = {
            "init_scale": float(scaling.init),
            "growth_factor": 1.0 + 1e-12 if fixed else scaling.growth_factor,
            "backoff_factor": 1.0 - 1e-12 if fixed else scaling.backoff_factor,
            "growth_interval": scaling.growth_interval,
            "enabled": scaling.mode != "none",
        }
        settings.update(torch_kwargs)
        self.minimum: dict[int, float] = {int(step): float(value) for step, value in dict(scaling.minimum).items()}
        self.static = fixed
        self.steps = 0
        settings["init_scale"] = max(settings["init_scale"], self.minimum_at(0))
        super().__init__(device or ("cuda" if torch.cuda.is_available() else "cpu"), **settings)

    def minimum_at(self, step: int) -> float:
        """The smallest scale allowed at `step`: the entry with the largest key that is not beyond it."""
        reached = [key for key in self.minimum if key <= step]
        return self.minimum[max(reached)] if reached else 0.0

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's. ModelError for float16 gradients, which torch refuses too: unscaled, what is small among them would be lost."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
        if self.is_enabled() and any(parameter.grad.dtype == torch.float16 for parameter in parameters):
            raise ModelError(
                "fp8fx.GradScaler: the optimizer has float16 parameters, whose gradients have no room for values without the loss scale. "
                "Keep the parameters in float32 (fp8fx.MasterWeights holds their values on the float16 grid all the same) or in bfloat16, "
                'or train without a loss scale: a recipe with loss_scaling: {mode: none}, such as "hybrid"'
            )
        super().unscale_(optimizer)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adjust the scale after a step, as torch does, then raise it to the minimum of this step."""
        if not self.is_enabled():
            return
        kept = self._scale.clone() if self.static and self._scale is not None else None  # type: ignore[has-type]
        super().update(new_scale)
        self.steps += 1
        if kept is not None and new_scale is None and self._scale is not None:
            self._scale.copy_(kept)
        floor = self.minimum_at(self.steps)
        if floor > 0 and self._scale is not None:
            self._scale.clamp_(min=floor)

    def state_dict(self) -> dict[str, Any]:
        """torch's entries, and `fp8fx_steps`: the position in the schedule."""
        state = super().state_dict()
        return {**state, "fp8fx_steps": self.steps} if state else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's entries and, where there, the position in the schedule."""
        state = dict(state_dict)
        self.steps = int(state.pop("fp8fx_steps", self.steps))
        super().load_state_dict(state)
