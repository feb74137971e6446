"""The sum over k of one tile of the result, step by step: what every form of an arithmetic but float products is defined by.

    acc = Q(acc + Q_products(multiplier(a_k, b_k)))          for k in ascending order: an outer product of a column of A and a row of B

Nothing is larger than a tile [m, n]: neither M N K products nor a table look-up of them ever exist. The same functions run eagerly, and
compiled by Inductor with everything but the tensors a constant (compiled.py), with the same bits.

The model of `hopper_fast`. One instruction adds 32 products to the accumulator; all 33 terms are aligned to the largest exponent among
them, what lies more than 13 bits below it is cut off, the sum is exact, and is cut to 13 fraction bits again:

    E   = max(exponent of acc, exponent of a_k + exponent of b_k for k of these 32)
    acc = cut_e8m13( 2^(E - 13) * (trunc(acc / 2^(E - 13)) + sum of trunc(a_k b_k / 2^(E - 13))) )

Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.5.2: "about 14 bits"; its remedy, promotion every 128 elements, is {chunk: 128, inner:
hopper_fast, outer: float32}); the study of e8m13 accumulators on the PyTorch blog; Khattak and Mikaitis on the alignment and the cut. It is
their model, not a promise of NVIDIA's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.arithmetic.numbers import FLOAT32, Draw, Round, number, rounder
from fp8fx.arithmetic.operands import Parts
from fp8fx.arithmetic.spec import HOPPER, Arithmetic
from fp8fx.arithmetic.stream import PRODUCTS, SUMS, Stream

INSTRUCTION = 32  # elements of k that one instruction adds
FRACTION = 13  # bits that its adder keeps below the largest exponent
LEAST = 2.0**-100  # the smallest power that terms are aligned to: its steps, 2^-113, are normal numbers, and so are their inverses


@dataclass(frozen=True)
class Steps:
    """How one arithmetic goes from k to k + 1. `table`: of a multiplier by table, on the operands' device."""

    kind: str  # exact | mitchell | table
    products: Round
    sums: Round
    hopper: bool = False
    table: Tensor | None = None

    @classmethod
    def of(cls, arithmetic: Arithmetic, kind: str, table: Tensor | None = None) -> Steps:
        def rounding(name: str) -> Round:
            return rounder(number(name), arithmetic.rounding, arithmetic.overflow)

        hopper = arithmetic.accumulate == HOPPER
        sums = rounding("float32" if hopper else arithmetic.accumulate)
        return cls(kind, rounding(arithmetic.products), sums, hopper, table)

    def advance(self, acc: Tensor, a: Parts, b: Parts, stream: Stream | None = None, start: int = 0) -> Tensor:
        """`acc` [m, n] after all of k of `a` [K, m] and `b` [K, n].

        stream: the tile's random words, where rounding is stochastic. start: which k the first is.
        """
        if self.hopper:
            for start in range(0, a.depth, INSTRUCTION):
                here = (slice(start, start + INSTRUCTION), slice(None))
                acc = instruction(acc, a[here], b[here])
            return acc
        for k in range(a.depth):
            product = self.products(self.multiply(a, b, k), drawing(stream, acc, start + k, PRODUCTS))
            acc = self.sums(acc + product, drawing(stream, acc, start + k, SUMS))
        return acc

    def multiply(self, a: Parts, b: Parts, k: int) -> Tensor:
        """The products of step k, float32 [m, n]."""
        product = a.values[k, :, None] * b.values[k]
        if self.kind == "exact":
            return product
        assert a.detail is not None
        assert b.detail is not None
        if self.kind == "mitchell":
            s = a.detail[k, :, None] + b.detail[k]
            return product * torch.maximum(s + 1.0, s + s)
        assert self.table is not None
        return product * self.table.index_select(0, a.detail[k]).index_select(1, b.detail[k])


def drawing(stream: Stream | None, x: Tensor, k: int, what: int) -> Draw | None:
    """What draws a word for each element of `x` [m, n], where there is a stream."""
    return None if stream is None else stream.draw(x.shape, k, what, x.device)


def instruction(acc: Tensor, a: Parts, b: Parts) -> Tensor:
    """One FP8 instruction of Hopper: `acc` [m, n] and up to 32 products."""
    assert a.detail is not None
    assert b.detail is not None
    largest = (acc.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=LEAST)
    for k in range(a.depth):
        largest = torch.maximum(largest, a.detail[k, :, None] * b.detail[k])
    scale = 2.0**FRACTION / largest
    total = _whole(acc * scale)
    for k in range(a.depth):
        total = total + _whole(a.values[k, :, None] * b.values[k] * scale)  # integers below 2^15 each: exact
    result = total * (largest * 2.0**-FRACTION)
    return (result.view(torch.int32) & -(1 << (FLOAT32.mantissa_bits - FRACTION))).view(torch.float32)


def _whole(x: Tensor) -> Tensor:
    """`x` cut to an integer; exact. Not trunc: torch hands that to MKL's threads, which cost milliseconds on a busy machine."""
    return x - x.frac()
