"""`fp8fx.Statistics`: what FP8 does to every tensor of a model, written down every so many steps.

    with fp8fx.Statistics(fast, jsonl="run/fp8.jsonl", tensorboard="run", every=100) as statistics:
        for batch in batches:
            train(fast, batch)      # forward, backward, optimizer.step()
            statistics.step()

One record per quantized tensor: layer, role, format, amax, scale, and the shares of its elements that underflow and overflow. Only a step
that is written is looked at (fp8fx.tally); the others pay for one addition and one comparison.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from fp8fx.clone import runtimes_of
from fp8fx.errors import ModelError
from fp8fx.sinks import JsonLines, Record, TensorBoard
from fp8fx.tally import Figures, Key, Tally


class Statistics:
    """Writes the statistics of a compiled model, or of the compiled models inside `model`, every `every` steps.

    jsonl: a file, to which lines are added. tensorboard: a folder, or a SummaryWriter (anything with its add_scalar), which is not closed
    here. start: the steps done before, after which counting goes on; by default what the model's own FP8 state says, which a checkpoint
    restores. A model under torch.compile(backend="fp8fx") must have been called once.
    Raises ModelError for arguments it cannot take, FP8Error for a file that cannot be written and where tensorboard is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        jsonl: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        every: int = 100,
        start: int | None = None,
    ) -> None:
        if jsonl is None and tensorboard is None:
            raise ModelError("fp8fx.Statistics has nowhere to write: give jsonl=<file>, tensorboard=<folder or SummaryWriter>, or both")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ModelError(f"every is how many steps lie between two that are written, an int from 1 on; got {every!r}")
        self.every = every
        self._runtimes = _compiled_inside(model)
        self._tally = Tally(model)
        self._observing = False
        self._sinks: list[JsonLines | TensorBoard] = [] if jsonl is None else [JsonLines(jsonl)]
        if tensorboard is not None:
            self._sinks.append(TensorBoard(tensorboard))
        self.number = max(runtime._position().step for _, runtime in self._runtimes) if start is None else start
        self._observe_next()

    def step(self, number: int | None = None) -> None:
        """A step is over: its backward and its optimizer's step. `number`: which one it was, where a trainer counts; else the next one."""
        self.number = self.number + 1 if number is None else number
        if self._observing:
            self._stop()
            if self.number % self.every == 0 and (records := self._records()):
                for sink in self._sinks:
                    sink.write(records)
        self._observe_next()

    def close(self) -> None:
        """Stop observing, and close what was opened here."""
        self._stop()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _observe_next(self) -> None:
        if (self.number + 1) % self.every == 0 and self._sinks:
            self._tally.start()
            self._observing = True

    def _stop(self) -> None:
        if self._observing:
            self._tally.stop()
            self._observing = False

    def _records(self) -> list[Record]:
        found = self._tally.figures()
        for path, runtime in self._runtimes:
            found |= {key: figures for key, figures in _kept(path, runtime).items() if key not in found}
        return [Record(self.number, self._layer(path, site), role, figures) for (path, site, role), figures in found.items()]

    def _layer(self, path: str, site: str) -> str:
        """A site's name, behind that of its model where there are several."""
        return f"{path}.{site}" if path and len({path for path, _ in self._runtimes}) > 1 else site


def _compiled_inside(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and Runtime of every compiled model in `model`, itself included."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"fp8fx.Statistics takes a compiled model, or a module that holds some; got {type(model).__name__}")
    modules = list(model.named_modules())
    found = [(path, runtime) for path, module in modules for runtime in runtimes_of(module) if runtime.root is module]
    if not found:
        raise ModelError(
            f"this {type(model).__name__} is not compiled by fp8fx, and holds no module that is: give what fp8fx.compile returned. A model "
            "under torch.compile(backend='fp8fx') must have been called once"
        )
    return found


def _kept(path: str, runtime: Any) -> dict[Key, Figures]:
    """The delayed records of the step that is over: all there is where kernels quantize, which nobody observes."""
    runtime._fold()
    state = runtime.scaling
    values = zip(state.slots, state.amax.tolist(), state.scale.tolist(), strict=True)
    return {(path, slot.site, slot.role): Figures(slot.format, amax, scale, scale) for slot, amax, scale in values if amax >= 0}
