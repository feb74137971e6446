"""The table of measured times, and interpolation in it. Times are GPU microseconds.

gemm    [M, K, N, *forward, *weight]: at each point of a full grid, the product Y [M, N] = X [M, K] W^T and the product
        dW [N, K] = dY^T X that contracts M, each once per column of COLUMNS. dX [M, K] = dY W is the forward product of (M, N, K).
casts   kind -> [[elements, us], ...]: see CASTS
host    us per training step and per inference call: `fixed` per graph, and what each linear layer adds in bf16 and in FP8
rates   TFLOP/s of float32 products, which have no column
"""

from __future__ import annotations

import functools
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import product
from typing import Any

# bf16; FP8 with one scale per tensor or per row, fast or precise accumulation (torch's kernels); `own_precise`: e5m2 x e5m2 on the
# project's kernel, which torch refuses; `block`: 1x128 by 128x128, and by 128x1 where M is contracted.
COLUMNS = ("bf16", "tensor_fast", "tensor_precise", "row_fast", "row_precise", "own_precise", "block")
# `both` layouts or one, under a scale that is known; `current`: the amax is measured first; `row`: one scale per row (and column).
CASTS = ("rows", "transposed", "both", "current", "current_both", "row", "row_both", "block", "block_both")

DEFAULT = "h100"


@dataclass(frozen=True)
class Table:
    """One device's table, ready for lookups. `source` is `measured` or `estimated`."""

    machine: Mapping[str, Any]
    source: str
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the grid's M, K, N
    logs: Mapping[tuple[int, int, int], tuple[float, ...]]  # (M, K, N) -> log of us per column, forward then weight
    casts: Mapping[str, tuple[tuple[float, float], ...]]
    host: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Table:
        """The table in the JSON `data`. ValueError where the grid has holes or columns are missing."""
        logs = {(int(m), int(k), int(n)): tuple(map(math.log, times)) for m, k, n, *times in data["gemm"]}
        axes = tuple(tuple(sorted({point[axis] for point in logs})) for axis in range(3))
        if set(product(*axes)) != set(logs) or any(len(times) != 2 * len(COLUMNS) for times in logs.values()):
            raise ValueError(f"a cost table needs {2 * len(COLUMNS)} times at every point of a full grid over M, K and N")
        casts = {kind: tuple((float(size), float(us)) for size, us in data["casts"][kind]) for kind in CASTS}
        return cls(data["machine"], data["source"], axes, logs, casts, data["host"], data["rates"])  # type: ignore[arg-type]

    def without_host(self) -> Table:
        """For graphs that run inside of CUDA graphs: what is in them adds nothing to the host's time."""
        return replace(self, host={mode: dict.fromkeys(times, 0.0) for mode, times in self.host.items()})

    def forward(self, m: int, k: int, n: int, column: str) -> float:
        """us of [m, k] by [k, n]."""
        return self._gemm(m, k, n, COLUMNS.index(column))

    def weight(self, m: int, k: int, n: int, column: str) -> float:
        """us of [n, m] by [m, k], which contracts the m rows of a batch."""
        return self._gemm(m, k, n, len(COLUMNS) + COLUMNS.index(column))

    def _gemm(self, m: int, k: int, n: int, index: int) -> float:
        """Log-linear in each axis; constant below the grid, where latency counts, and proportional above it."""
        places = [_place(axis, size) for axis, size in zip(self.axes, (m, k, n), strict=True)]
        total = 0.0
        for corner in product(*(place.ends for place in places)):
            total += math.prod(weight for _, weight in corner) * self.logs[corner[0][0], corner[1][0], corner[2][0]][index]
        return math.exp(total) * math.prod(place.beyond for place in places)

    def cast(self, kind: str, elements: int) -> float:
        """us of one cast of a tensor of so many elements."""
        sizes = tuple(size for size, _ in self.casts[kind])
        times = dict(self.casts[kind])
        place = _place(sizes, max(elements, 1))
        return math.exp(sum(weight * math.log(times[size]) for size, weight in place.ends)) * place.beyond


@dataclass(frozen=True)
class _Place:
    """Where a size lies between grid points: ((point, weight), ...), and its ratio to the last point where it lies beyond."""

    ends: tuple[tuple[Any, float], ...]
    beyond: float = 1.0


def _place(axis: Sequence[float], size: int) -> _Place:
    if size <= axis[0]:
        return _Place(((axis[0], 1.0),))
    if size >= axis[-1]:
        return _Place(((axis[-1], 1.0),), size / axis[-1])
    i = bisect_right(axis, size)
    low, high = axis[i - 1], axis[i]
    share = math.log(size / low) / math.log(high / low)
    return _Place(((low, 1 - share), (high, share)))


def table_name(device: str) -> str:
    """`h100` of "NVIDIA H100 80GB HBM3": the word of a device's name that tells the chip; the whole name where there is none."""
    words = device.lower().split()
    return next((word for word in words if re.fullmatch(r"[a-z]{1,3}\d{2,4}[a-z]*", word)), re.sub(r"\W+", "_", device.lower()))


@functools.cache
def load(device: str = DEFAULT) -> Table:
    """The table of a device, by torch's name for it; that of the H100 for one that has none of its own."""
    folder = resources.files("fp8fx.costs")
    path = folder / f"{table_name(device)}.json"
    if not path.is_file():
        path = folder / f"{DEFAULT}.json"
    return Table.of(json.loads(path.read_text(encoding="utf-8")))
