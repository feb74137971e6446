"""scaled_mm: the one GEMM all others are made of, forward and backward.

    scaled_mm(a [..., M, K], b [..., K, N]) = (decode(a) @ decode(b)) * scale_a * scale_b (+ bias)     accumulated in fp32

An operand with format "" is not quantized: it enters as it is, in fp32, and has no scale. Scales of a tensor or of rows
(constant along the contraction) multiply the result; scales of blocks multiply the partial sum of each block of K, as the
hardware does. One rounding to `dtype` ends it.

`accumulate` is `fast` or `precise`, or the text of an `fp8fx.arithmetic.Arithmetic`: the products of the decoded values, and their sums
before the scales, are then made as that says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.arithmetic.product import product
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.arithmetic.stream import Stream
from fp8fx.ops.arguments import signature, takes
from fp8fx.ops.library import define
from fp8fx.spec import ACCUMULATORS


class ScaledMM(NamedTuple):
    """The arguments of `scaled_mm`. `block_a` is [] or the (rows, columns) of A's blocks over [M, K]; `block_b` likewise over [K, N]."""

    a: Tensor
    scale_a: Tensor | None
    format_a: str
    block_a: list[int]
    b: Tensor
    scale_b: Tensor | None
    format_b: str
    block_b: list[int]
    bias: Tensor | None
    dtype: torch.dtype
    accumulate: str = "precise"


class Draws(NamedTuple):
    """Which random words an arithmetic with stochastic rounding draws. rng: int64 [seed, step, call]."""

    rng: Tensor | None = None
    site: str = ""
    role: str = "output"


@takes(ScaledMM, Draws)
def scaled_mm_reference(mm: ScaledMM, draws: Draws) -> Tensor:
    left, right = operand(mm.a, mm.format_a), operand(mm.b, mm.format_b)
    multiply = multiplication(mm.accumulate, mm.format_a, mm.format_b, *draws)
    if mm.block_a or mm.block_b:
        result = _blocked(left, right, mm, multiply)
    else:
        result = apply_scales(multiply(left, right), mm.scale_a, mm.scale_b)
    if mm.bias is not None:
        result = result + mm.bias.float()
    return result.to(mm.dtype)


def multiplication(
    accumulate: str, format_a: str, format_b: str, rng: Tensor | None = None, site: str = "", role: str = "output"
) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of two float32 matrices, of values of these formats. Each call has random words of its own, where any are drawn."""
    if accumulate in ACCUMULATORS:
        return torch.matmul
    arithmetic, parts = Arithmetic.parse(accumulate), itertools.count()
    if not arithmetic.stochastic or rng is None:
        return lambda a, b: product(a, b, arithmetic, (format_a, format_b))

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        stream = Stream.of(rng[0], site, role, next(parts), rng[1], rng[2])
        return product(a, b, arithmetic, (format_a, format_b), stream=stream)

    return multiply


def operand(x: Tensor, format: str) -> Tensor:
    """float32 values of codes, or of a tensor that stays in high precision (format "")."""
    return numerics.decode(x, format) if format else x.float()


def apply_scales(result: Tensor, scale_a: Tensor | None, scale_b: Tensor | None) -> Tensor:
    """Multiply a fresh fp32 `result` in place; two per-tensor scales are multiplied first, one pass instead of two."""
    if scale_a is not None and scale_b is not None and scale_a.dim() == 0 and scale_b.dim() == 0:
        return result.mul_(scale_a * scale_b)
    for scale in (scale_a, scale_b):
        if scale is not None:
            result = result.mul_(scale)
    return result


def _blocked(left: Tensor, right: Tensor, mm: ScaledMM, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over blocks of K, each partial product scaled before it is added. The step divides both operands' blocks."""
    depth = left.shape[-1]
    step = math.gcd(mm.block_a[1] if mm.block_a else 0, mm.block_b[0] if mm.block_b else 0)
    if depth == 0:  # an empty sum: there are no blocks either
        return left @ right
    result = left.new_zeros(1)
    for start in range(0, depth, step):
        part = multiply(left[..., start : start + step], right[..., start : start + step, :])
        part = part * _slice_scale(mm.scale_a, mm.block_a, start, part.shape[-2], contraction=-1)
        result = result + part * _slice_scale(mm.scale_b, mm.block_b, start, part.shape[-1], contraction=-2)
    return result


def _slice_scale(scale: Tensor | None, block: list[int], start: int, size: int, contraction: int) -> Tensor | float:
    """The scales of the block of K that holds `start`, one per row of A ([..., M, 1]) or column of B ([..., 1, N])."""
    if scale is None:
        return 1.0
    if not block:
        return scale
    other = -3 - contraction  # the dimension that is not contracted: -2 for A, -1 for B
    along = block[contraction % 2]
    picked = scale.narrow(contraction, start // along, 1)
    return picked.repeat_interleave(block[other % 2], dim=other).narrow(other, 0, size)


@takes(ScaledMM)
def scaled_mm_fake(mm: ScaledMM) -> Tensor:
    batch = torch.broadcast_shapes(mm.a.shape[:-2], mm.b.shape[:-2])
    return mm.a.new_empty((*batch, mm.a.shape[-2], mm.b.shape[-1]), dtype=mm.dtype)


scaled_mm = define(f"scaled_mm({signature(ScaledMM)}) -> Tensor", scaled_mm_reference, scaled_mm_fake)
