"""What a compiled model keeps between calls, and never on a captured graph: the step, the random stream, quantized weights.

Graphs may be shared and copied by torch; this state belongs to one model and is looked up by parameter identity at call time.
A step begins at the first training forward after an optimizer step, whichever optimizer holds the model's parameters.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8fx.errors import ModelError
from fp8fx.passes.lower import WeightInput

Parts = tuple[Tensor, Tensor, Tensor]  # codes, scale, amax of a quantized weight


@dataclass
class Stream:
    """Position in the random stream of stochastic rounding: Philox counter words (docs/numerics.md)."""

    seed: int = 0
    step: int = 0
    call: int = 0
    process: int = 0  # rank among the processes that train the model together: each draws bits of its own

    def tensor(self, device: torch.device) -> Tensor:
        """int64 [seed, step, call] of the current call. The upper 12 bits of the call's 32 are the process."""
        values = [self.seed, self.step, self.call + (self.process << 20)]
        if device.type != "cuda":
            return torch.tensor(values, dtype=torch.int64, device=device)
        if torch.cuda.is_current_stream_capturing():
            raise ModelError(
                "stochastic rounding inside of torch.cuda.graph: every replay would draw the same bits. Leave the capture of CUDA graphs "
                'to fp8fx.compile(model, inner_mode="reduce-overhead"), or round to nearest'
            )
        # From pageable memory the host would wait for the GPU.
        return torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True).to(device, non_blocking=True)


class WeightCache:
    """Quantized weights, kept as long as the parameter is the same tensor with the same contents, as far as torch can tell.

    Writes through `.data` do not change a tensor's version; `fp8fx.invalidate(model)` is for those.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[Any, int, int, Parts]] = {}

    def get(self, weight: Tensor, wanted: WeightInput, keep: bool, scale: Tensor | None = None) -> Parts:
        """`weight` as `wanted` says, under `scale` if its scaling is delayed; read from the cache and kept there only if `keep`."""
        if not keep or weight.is_inference():
            return quantize_weight(weight, wanted, scale)
        key = (id(weight), wanted.views, wanted.spec, wanted.dims)
        found = self._entries.get(key)
        if found is not None and found[0]() is weight and found[1:3] == (weight._version, weight.data_ptr()):
            return found[3]
        parts = quantize_weight(weight, wanted, scale)
        entries = self._entries
        gone = weakref.ref(weight, lambda _: entries.pop(key, None))  # an entry that is replaced takes its callback along
        entries[key] = (gone, weight._version, weight.data_ptr(), parts)
        return parts

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def quantize_weight(weight: Tensor, wanted: WeightInput, scale: Tensor | None = None) -> Parts:
    with torch.no_grad():
        viewed, dims = wanted.view(weight), list(wanted.dims)
        parts: Parts = torch.ops.fp8fx.quantize.default(viewed, wanted.spec, dims, None, wanted.site, "weight", scale)
    return parts


class OptimizerSteps:
    """Tells models that an optimizer stepped. One global hook for the process; models are held weakly."""

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handle: Any = None
        self._paused = False

    def listen(self, listener: Any) -> None:
        """`listener.parameters()` gives its parameters, `listener.optimizer_stepped()` is called after a step that has one of them."""
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after_step)
        self._listeners.add(listener)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For steps that update nothing: torch.distributed.checkpoint makes one to see what state an optimizer keeps."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._paused:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for listener in list(self._listeners):
            if any(id(p) in stepped for p in listener.parameters()):
                listener.optimizer_stepped()


OPTIMIZER_STEPS = OptimizerSteps()
