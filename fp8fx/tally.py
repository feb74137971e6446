"""What one step's quantizations did to each tensor: amax, scale, and the shares of its elements that FP8 lost.

    underflow   non-zero elements whose code is worth zero, of the non-zero ones
    overflow    finite elements beyond the format, of all: further out than half a step past its largest value, or with code inf or NaN

Counted on the tensors' device while a step is observed (fp8fx.ops.observe), and read by the host once, when the step is over.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx import formats, graph_call, numerics
from fp8fx.formats import Format
from fp8fx.graph_call import GraphCall
from fp8fx.ops import observe
from fp8fx.spec import TensorSpec

Key = tuple[str, str, str]  # path of the compiled model in the one that is looked at, site, role
SUMS = 4  # elements, those not zero, those of them that became zero, those beyond the format


@dataclass(frozen=True)
class Figures:
    """One tensor's in one step. scale: the largest, where there are several; scale_min: the smallest. Shares are in [0, 1]."""

    format: str
    amax: float
    scale: float
    scale_min: float
    underflow: float | None = None
    overflow: float | None = None


def measure(x: Tensor, q: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """float32 [3]: amax over finite elements, largest scale, minus the smallest; float64 [SUMS]. `x` and its codes `q` have one shape."""
    format = formats.get(spec.format)
    magnitude = x.float().abs()
    finite = magnitude < math.inf
    values = numerics.decode(q, format)
    beyond = magnitude > numerics.expand_scale(scale.float(), spec.granularity, tuple(x.shape)) * reach(format)
    overflow = finite & (beyond | ~(values.abs() < math.inf))
    nonzero = magnitude != 0
    sums = [torch.count_nonzero(t) for t in (nonzero, nonzero & (values == 0), overflow)]
    amax = torch.where(finite, magnitude, 0.0).amax() if x.numel() else magnitude.new_zeros(())
    largest = torch.stack([amax, scale.amax().float(), -scale.amin().float()]) if scale.numel() else magnitude.new_zeros(3)
    return largest, torch.stack([sums[0].new_tensor(x.numel()), *sums]).double()


def reach(format: Format) -> float:
    """Half a step past the largest value: what lies beyond rounds to nothing the format has."""
    return (format.max + format.beyond) / 2


class Tally:
    """Figures of one training step, between `start` and `stop`, of the compiled models inside `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._running = threading.local()  # .path: of the compiled model whose forward this thread is in
        self._made: list[tuple[int, int, str]] = []  # autograd nodes by sequence number: first, end, path of the model that made them
        self._found: dict[Key, tuple[str, Tensor, Tensor]] = {}

    def start(self) -> None:
        self._found, self._made = {}, []
        graph_call.OBSERVERS.append(self._around)
        observe.OBSERVERS.append(self._see)

    def stop(self) -> None:
        graph_call.OBSERVERS.remove(self._around)
        observe.OBSERVERS.remove(self._see)

    @contextlib.contextmanager
    def _around(self, call: GraphCall) -> Iterator[None]:
        """One call of a rewritten graph. Evaluation is no part of a step."""
        root = call.runtime.root
        before = getattr(self._running, "path", None)
        counts = torch.is_grad_enabled() and root.training and not call.calibrating
        self._running.path = self._paths.get(id(root)) if counts else None
        first = _next_node()
        try:
            yield
        finally:
            if self._running.path is not None:
                self._made.append((first, _next_node(), self._running.path))
            self._running.path = before

    def _owner(self) -> str | None:
        """The model that a quantization belongs to: the one whose forward runs, else the one that made the node whose backward runs.

        Models of one class have sites of the same names, and one backward may go through several of them.
        """
        path: str | None = getattr(self._running, "path", None)
        node = torch._C._current_autograd_node() if path is None else None
        if node is None:
            return path
        number = node._sequence_nr()
        return next((path for first, end, path in self._made if first <= number < end), None)

    def _see(self, site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: TensorSpec) -> None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a CUDA graph would count again at every replay
            return
        path = self._owner()
        if path is None:
            return
        with torch.no_grad():
            largest, sums = measure(x, q, scale, spec)
            before = self._found.get((path, site, role))
            if before is not None:
                largest, sums = torch.maximum(largest, before[1]), sums + before[2]
            self._found[path, site, role] = (spec.format, largest, sums)

    def figures(self) -> dict[Key, Figures]:
        """What was seen since `start`, in order; one read from each device."""
        return {key: _figures(self._found[key][0], values) for key, values in self._read().items()}

    def _read(self) -> dict[Key, list[float]]:
        devices: dict[Any, list[Key]] = {}
        for key, (_, largest, _) in self._found.items():
            devices.setdefault(largest.device, []).append(key)
        read: dict[Key, list[float]] = {}
        for keys in devices.values():
            rows = torch.stack([torch.cat([self._found[key][1].double(), self._found[key][2]]) for key in keys])
            read.update(zip(keys, rows.tolist(), strict=True))
        return {key: read[key] for key in self._found}


def _next_node() -> int:
    """The sequence number that autograd gives its next node in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def _figures(format: str, row: list[float]) -> Figures:
    amax, scale, minus_smallest, elements, nonzero, flushed, beyond = row
    return Figures(format, amax, scale, -minus_smallest, flushed / max(nonzero, 1), beyond / max(elements, 1))
