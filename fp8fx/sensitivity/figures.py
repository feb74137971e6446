"""What quantization does to each tensor of a model, summed over its quantizations: SQNR, underflow, overflow, exponents.

    SQNR        10 log10(sum x^2 / sum (x - scale q)^2)        dB, over finite elements
    underflow   non-zero elements whose code is worth zero, of the non-zero ones
    overflow    finite elements beyond the format, of all (fp8fx.tally)
    exponents   how many elements have floor(log2 |x / scale|) = e: where the tensor lies in the format's range

Observed where operators quantize (fp8fx.ops.observe). Kernels observe nothing, so the operators are opened to their references, on every
device; and the graph is that after insert_qdq, where every layer still has quantizations of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp8fx import formats, graph_call, numerics
from fp8fx.formats import Format
from fp8fx.graph_call import GraphCall
from fp8fx.ops import observe
from fp8fx.ops.library import REFERENCES
from fp8fx.spec import TensorSpec
from fp8fx.tally import measure

LOW, HIGH = -64, 64  # exponents of the histogram; what lies outside is counted at the end


@dataclass
class Figures:
    """One role of one layer. float64 sums on the CPU, int64 counts by exponent from LOW to HIGH."""

    spec: TensorSpec
    signal: float = 0.0
    noise: float = 0.0
    elements: float = 0.0
    nonzero: float = 0.0
    flushed: float = 0.0
    beyond: float = 0.0
    amax: float = 0.0
    exponents: Tensor = field(default_factory=lambda: torch.zeros(HIGH - LOW + 1, dtype=torch.int64))

    def add(self, x: Tensor, q: Tensor, scale: Tensor, spec: TensorSpec) -> None:
        largest, sums = measure(x, q, scale, spec)
        values = numerics.dequantize_tensor(q, scale, spec.format, spec.granularity).double()
        finite, wide = x.isfinite(), x.double()
        signal = torch.where(finite, wide, 0.0).square().sum()
        noise = torch.where(finite, wide - values, 0.0).square().sum()
        row = torch.cat([sums, torch.stack([largest[0].double(), signal, noise])]).tolist()
        self.elements, self.nonzero = self.elements + row[0], self.nonzero + row[1]
        self.flushed, self.beyond = self.flushed + row[2], self.beyond + row[3]
        self.amax = max(self.amax, row[4])
        self.signal, self.noise = self.signal + row[5], self.noise + row[6]
        self.exponents += _exponents(x, scale, spec)

    @property
    def sqnr(self) -> float:
        """dB; inf where nothing was lost, -inf where a finite element became inf or NaN, NaN for a tensor of zeros."""
        if not math.isfinite(self.noise):
            return -math.inf
        if self.signal == 0:
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def underflow(self) -> float:
        return self.flushed / max(self.nonzero, 1.0)

    @property
    def overflow(self) -> float:
        return self.beyond / max(self.elements, 1.0)


def _exponents(x: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """int64 [HIGH - LOW + 1]: elements by floor(log2 |x / scale|), zeros and what is not finite left out."""
    scaled = x.double() / numerics.expand_scale(scale.double(), spec.granularity, tuple(x.shape))
    chosen = scaled[(scaled != 0) & scaled.isfinite()]
    places = (torch.frexp(chosen).exponent - 1).clamp(LOW, HIGH) - LOW
    return torch.bincount(places.long().flatten(), minlength=HIGH - LOW + 1).cpu()


def exponent_range(format: Format) -> tuple[int, int, int]:
    """Exponents of the format's smallest subnormal, smallest normal and largest value. Integers have no subnormals."""
    if format.integer:
        return 0, 0, math.frexp(format.max)[1] - 1
    return tuple(math.frexp(value)[1] - 1 for value in (format.min_subnormal, format.min_normal, format.max))  # type: ignore[return-value]


class Collector:
    """Figures by layer and role, of what runs inside `collecting`; the backward is run inside `Opened`."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Figures] = {}
        # What was seen in the graph's call that runs: each reader of a tensor has a quantization of its own, under the name of the first.
        # The tensors are held, so that no other one comes to lie at the same place meanwhile.
        self._seen: dict[tuple[Any, ...], Tensor] = {}
        self._calls = 0

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        graph_call.OBSERVERS.append(self._around)
        observe.OBSERVERS.append(self._see)
        try:
            yield
        finally:
            graph_call.OBSERVERS.remove(self._around)
            observe.OBSERVERS.remove(self._see)

    @contextlib.contextmanager
    def _around(self, call: GraphCall) -> Iterator[None]:
        """Dynamo compiles nothing while a dispatch mode is on, so it is on inside of the graph's call only."""
        self._calls += 1
        try:
            with Opened():
                yield
        finally:
            self._calls -= 1
            self._seen.clear()

    def _again(self, site: str, role: str, x: Tensor, scale: Tensor, spec: TensorSpec) -> bool:
        """The same quantization ran already, for another reader."""
        if not self._calls:  # a backward has no such copies
            return False
        key = (site, role, spec.text, x.data_ptr(), x.shape, x.stride(), scale.shape)
        return self._seen.setdefault(key, x) is not x

    @torch.no_grad()
    def _see(self, site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: TensorSpec) -> None:
        if x.numel() and not self._again(site, role, x, scale, spec):
            self.found.setdefault((site, role), Figures(spec)).add(x, q, scale, spec)


class Opened(TorchDispatchMode):
    """Runs the reference of every fp8fx operator, whatever kernels the device has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fp8fx":
            return func(*args, **(kwargs or {}))
        given = list(args) + [
            (kwargs or {}).get(arg.name, arg.default_value if arg.has_default_value() else None)
            for arg in func._schema.arguments[len(args) :]
        ]
        with self:
            return REFERENCES[func._schema.name.removeprefix("fp8fx::")](*given)


def describe_format(spec: TensorSpec) -> tuple[str, tuple[int, int, int]]:
    """The text of a spec's format and granularity, and its range of exponents."""
    format = formats.get(spec.format)
    return f"{spec.format}/{spec.text.split('/')[2]}", exponent_range(format)
