"""Random bits of one matrix product, for `rounding: stochastic`: words of Philox (fp8fx.numerics.philox) by position.

    key       two words that Philox makes of (part, step, call, 0) under (seed mod 2^32, producer key xor (seed >> 32))
    counter   (n >> 2, m, k, what)      the element takes word n & 3 of this block of four
    m, n      row and column in the whole result [..., M, N], rows counted through all leading dimensions
    k         what = PRODUCTS, SUMS: the step of the sum; OUTER: the first of the chunk that is added; OUTPUT: 0

The counter says where an element lies and not when it is reached, so that tiles, their order and the device do not change the bits.
Products, sums, outer sums and outputs have streams of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.arithmetic.numbers import Draw
from fp8fx.numerics.philox import Word, philox_block, producer_key

PRODUCTS, SUMS, OUTER, OUTPUT = range(4)
LANES = 4  # neighbours in a row that share a block

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Stream:
    """The words of a product's result from `row` and `column` on."""

    key: tuple[Word, Word]
    row: int = 0
    column: int = 0

    @classmethod
    def of(cls, seed: Word, site: str, role: str, part: int = 0, step: Word = 0, call: Word = 0) -> Stream:
        """seed: 64 bits. site, role: who asks. part: which product of this call. step, call: counters. Ints, or int64 tensors ()."""
        producer = producer_key(site, f"arithmetic {role}")
        first, second, *_ = philox_block((part, step & _MASK, call & _MASK, 0), (seed & _MASK, ((seed >> 32) ^ producer) & _MASK))
        return cls((first, second))

    def at(self, row: int, column: int = 0) -> Stream:
        """The words from `row` and `column` of these on."""
        return dataclasses.replace(self, row=self.row + row, column=self.column + column)

    def words(self, shape: tuple[int, int] | torch.Size, k: int, what: int, device: torch.device) -> Tensor:
        """int64 [m, n] in [0, 2^32)."""
        first, last = self.column // LANES, (self.column + shape[1] + LANES - 1) // LANES
        rows = torch.arange(self.row, self.row + shape[0], dtype=torch.int64, device=device)[:, None]
        blocks = torch.arange(first, last, dtype=torch.int64, device=device)
        lanes = torch.stack([torch.as_tensor(word) for word in philox_block((blocks, rows, k, what), self.key)], dim=-1)
        skipped = self.column - first * LANES
        return lanes.reshape(shape[0], -1)[:, skipped : skipped + shape[1]]

    def draw(self, shape: tuple[int, int] | torch.Size, k: int, what: int, device: torch.device) -> Draw:
        """`words`, when something is rounded."""
        return lambda: self.words(shape, k, what, device)
