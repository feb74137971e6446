"""Coverage measured from executed operands: which multiplications really had both operands on a format's grid?

    with CoverageMeter(["e4m3fn", "e5m2"]) as meter:
        meter.run_backward(fast(x).sum())
    meter.share(fast.plan())

Every aten multiplication (mm, bmm, addmm, baddbmm, convolution and its backward) that a rewritten graph or the backward executes is
seen by a dispatch mode. fp8fx's own operators are opened: their reference runs under the same mode, so that the multiplications
inside are seen with the operands they really get. The plan is not asked. A multiplication outside fp8fx's operators is high
precision, whatever its values.

Dynamo compiles nothing while a dispatch mode is on, so the forward turns the mode on inside the rewritten graph's own call. What runs
eagerly between two graphs is therefore not seen: compare `total` with `plain_flops` of the model itself. Only the eager inner
compiler shows its operands; compile the model with `inner="eager"` to measure it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp8fx import formats, numerics
from fp8fx.graph_call import OBSERVERS, GraphCall
from fp8fx.ops.library import REFERENCES
from fp8fx.plan import Plan

aten = torch.ops.aten
# Operators of transformers that run a mixture's experts where torch's own cannot: (input, weight, offs[, grad_output]).
GROUPED = ("transformers::grouped_mm_fallback", "transformers::grouped_mm_fallback_backward")
Grid = Callable[[Tensor], str]  # the format whose grid holds every element, or ""


def grid_of(names: Sequence[str]) -> Grid:
    """The first of the formats `names` in which every element of a tensor is a value of its own."""
    known = [formats.get(name) for name in names]

    def grid(x: Tensor) -> str:
        values = x.detach().float()
        for format in known:
            rounded = numerics.round_to_format(values, format, overflow="saturate")
            if torch.equal(torch.nan_to_num(rounded), torch.nan_to_num(values)):
                return format.name
        return ""

    return grid


@dataclass
class Coverage:
    """FLOPs (a multiply-add is two) by the grids of the two operands; "" is high precision."""

    flops: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.flops.values())

    @property
    def on_grid(self) -> int:
        return sum(count for grids, count in self.flops.items() if all(grids))

    def share(self, exempt: int = 0) -> float:
        """Share of the FLOPs that ran on two operands on a grid, of all but the `exempt` ones; 0 if there are no others."""
        rest = self.total - exempt
        return self.on_grid / rest if rest > 0 else 0.0


class CoverageMeter:
    """Context manager; see the module docstring. `grids`: format names, or a function from an operand to its format's name."""

    def __init__(self, grids: Sequence[str] | Grid = ("e4m3fn", "e5m2")) -> None:
        self._grid: Grid = grids if callable(grids) else grid_of(grids)
        self.forward, self.backward = Coverage(), Coverage()

    def _observe_forward(self, call: GraphCall) -> _Counting:
        return _Counting(self.forward, self._grid)

    def __enter__(self) -> CoverageMeter:
        OBSERVERS.append(self._observe_forward)
        return self

    def __exit__(self, *problem: Any) -> None:
        OBSERVERS.remove(self._observe_forward)

    def run_backward(self, loss: Tensor) -> None:
        with _Counting(self.backward, self._grid):
            loss.backward()

    def share(self, plan: Plan) -> float:
        """Of forward and backward together, without the exempt layers' three GEMMs."""
        both = Coverage(self.forward.flops + self.backward.flops)
        return both.share(3 * plan.exempt_flops)


def plain_flops(function: Callable[[], Any]) -> int:
    """All multiplications' FLOPs of a high-precision `function`, counted the same way."""
    with _Counting(Coverage(), lambda x: "") as mode:
        function()
    return mode.coverage.total


class _Counting(TorchDispatchMode):
    def __init__(self, coverage: Coverage, grid: Grid) -> None:
        super().__init__()
        self.coverage, self.grid = coverage, grid
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fp8fx":
            with self:
                self._inside += 1
                try:
                    return REFERENCES[func._schema.name.removeprefix("fp8fx::")](*_full(func, args, kwargs))
                finally:
                    self._inside -= 1
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        for a, b, flops in _products(func.overloadpacket, _full(func, args, kwargs)):
            grids = (self.grid(a), self.grid(b)) if self._inside else ("", "")
            self.coverage.flops[grids] += flops
        return func(*args, **kwargs)


def _full(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of an operator in the order of its schema, defaults included: references take them by position."""
    arguments = func._schema.arguments
    return [
        args[i] if i < len(args) else kwargs.get(arg.name, arg.default_value if arg.has_default_value() else None)
        for i, arg in enumerate(arguments)
    ]


def _products(packet: Any, args: Sequence[Any]) -> list[tuple[Tensor, Tensor, int]]:
    """(operand, operand, FLOPs) of each GEMM that this aten call performs."""
    if packet in (aten.mm, aten.bmm):
        a, b = args[:2]
    elif packet in (aten.addmm, aten.baddbmm):
        a, b = args[1:3]
    elif packet is aten.convolution:
        x, w, transposed = args[0], args[1], args[6]
        return [(x, w, 2 * math.prod(x.shape if transposed else _output(args)) * math.prod(w.shape[1:]))]
    elif packet is aten.convolution_backward:
        dy, x, w, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        flops = 2 * math.prod(x.shape if transposed else dy.shape) * math.prod(w.shape[1:])
        return [(dy, other, flops) for other, wanted in ((w, mask[0]), (x, mask[1])) if wanted]
    elif packet is aten._grouped_mm or packet._qualified_op_name in GROUPED:
        return _grouped_products(args)
    else:
        return []
    return [(a, b, 2 * math.prod(a.shape) * b.shape[-1])]


def _grouped_products(args: Sequence[Any]) -> list[tuple[Tensor, Tensor, int]]:
    """Rows in groups: [S, K] by [E, K, N], or [K, S] by [S, N]; a fourth tensor is the gradient of transformers' own backward."""
    a, b, offs = args[:3]
    if offs is None:
        return [(a, b, 2 * math.prod(a.shape) * b.shape[-1])]
    rows = int(offs[-1])
    if b.dim() == 2:
        return [(a, b, 2 * a.shape[0] * rows * b.shape[-1])]
    flops = 2 * rows * b.shape[-2] * b.shape[-1]
    if len(args) > 3 and isinstance(args[3], Tensor) and args[3].dim() == 2:
        return [(args[3], b, flops), (args[3], a, flops)]
    return [(a, b, flops)]


def _output(args: Sequence[Any]) -> tuple[int, ...]:
    with torch.no_grad():
        x, w, _, *geometry = args[:9]
        return tuple(torch.convolution(x.to("meta"), w.to("meta"), None, *geometry).shape)
