"""The compiled form: Inductor makes one loop of many steps of the sum, the accumulator in registers.

One compiled function per arithmetic, for tiles of one shape and a fixed number of steps; what remains at the edges is padded with zeros
(rows and columns, which are thrown away) or runs eagerly (the last elements of k). Formats and tables' sizes are constants, as they must
be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fp8fx.arithmetic.operands import Parts
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.arithmetic.tiles import INSTRUCTION, Steps

ROWS, COLUMNS = 128, 512
DEPTH = 8  # elements of k in one call: more would take longer to compile, and save little more of reading and writing the accumulator


@functools.lru_cache(maxsize=64)
def _function(arithmetic: Arithmetic, kind: str) -> Any:
    def run(acc: Tensor, a: Tensor, a_detail: Tensor | None, b: Tensor, b_detail: Tensor | None, table: Tensor | None) -> Tensor:
        return Steps.of(arithmetic, kind, table).advance(acc, Parts(a, a_detail), Parts(b, b_detail))

    return torch.compile(run, dynamic=False, fullgraph=True)


def advance(arithmetic: Arithmetic, steps: Steps, acc: Tensor, a: Parts, b: Parts) -> Tensor:
    """`steps.advance`, compiled; any [m, n] up to [ROWS, COLUMNS], any K. Bit for bit the same."""
    m, n = acc.shape
    depth = INSTRUCTION if steps.hopper else DEPTH
    function = _function(arithmetic, steps.kind)
    acc, a, b = _padded(acc, ROWS, COLUMNS), _wide(a, ROWS), _wide(b, COLUMNS)
    whole = a.depth - a.depth % depth
    for start in range(0, whole, depth):
        rows = slice(start, start + depth)
        left, right = a[rows, slice(None)], b[rows, slice(None)]
        acc = function(acc, _own(left.values), _own(left.detail), _own(right.values), _own(right.detail), steps.table)
    acc = acc[:m, :n]
    if whole < a.depth:
        rest = slice(whole, None)
        acc = steps.advance(acc, a[rest, slice(0, m)], b[rest, slice(0, n)])
    return acc


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous()


def _wide(parts: Parts, size: int) -> Parts:
    def pad(x: Tensor | None) -> Tensor | None:
        return None if x is None else _padded(x, x.shape[0], size)

    values = pad(parts.values)
    assert values is not None
    return Parts(values, pad(parts.detail))


def _own(x: Tensor | None) -> Tensor | None:
    """Of equal strides and alignment for every call: one compiled form serves all."""
    return None if x is None else x.contiguous()
