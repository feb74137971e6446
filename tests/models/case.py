"""One model of the zoo: the module, its input, its targets, and how to build it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracle import cast
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A model in train mode without dropout, keyword arguments for one call, and integer targets for a cross-entropy."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    targets: Tensor

    def logits(self, model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        output = model(**cast(self.inputs, dtype))
        return output if isinstance(output, Tensor) else output.logits

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())


@dataclass(frozen=True)
class Entry:
    """How to make one case. `family`: timm or transformers.

    `loss_scale`: for recipes whose gradients have no scale, as a GradScaler would settle it: the largest of a few powers of 16 that
    overflows nowhere.
    """

    family: str
    build: Callable[[], Case]
    loss_scale: float = 4096.0


def without_randomness(model: nn.Module) -> nn.Module:
    """`model` with every dropout and stochastic depth at rate 0: two forwards of it must give the same numbers."""
    for module in model.modules():
        for attribute in ("drop_prob", "drop_rate", *(("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ())):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def wake_blocks(model: nn.Module) -> nn.Module:
    """`model` with what starts at zero and switches a residual block off at one: the gain of its last norm or convolution."""
    for module in model.modules():
        gain = module.weight if isinstance(module, nn.modules.batchnorm._BatchNorm) else getattr(module, "gain", None)
        if isinstance(gain, nn.Parameter) and not gain.any():
            nn.init.ones_(gain)
    return model


def wake_head(head: nn.Module) -> None:
    """A head that starts at zero hides the model behind it: every gradient but its own would be zero."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
