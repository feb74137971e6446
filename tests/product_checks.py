"""scaled_mm against float64, within a bound derived from its formula.

Products of two FP8 numbers are exact in float32, and float32 accumulation of K terms errs by at most K 2^-24 sum |a b|. Hopper aligns
the terms of an addition, the accumulator among them, to the largest, and cuts each off 13 bits below it or more. Over random signs
these errors have no bias and add up as a random walk: sqrt(K) steps of 2^-13 of the largest partial sum, which is a walk too, of
deviation s = sqrt(sum (a b)^2). Six deviations of each bound `fast` by 36 sqrt(K) 2^-13 s; `precise` and blocks, which hand over to
float32 every 256 or less, by the same with K = 256. The output adds half a step of its dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = [(E4, E4), (E4, E5), (E5, E4), (E5, E5)]
HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
Block = tuple[int, int]


def random_codes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def operands(m: int, n: int, k: int, pair: tuple[torch.dtype, torch.dtype], device: str) -> tuple[Tensor, Tensor]:
    return random_codes((m, k), pair[0], device), random_codes((n, k), pair[1], device).t()


def spread(scale: Tensor, block: Block | None, shape: tuple[int, ...]) -> Tensor:
    if block is not None:
        scale = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[-2], : shape[-1]]
    return scale.double()


def check(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    accumulate: str = "fast",
    block_a: Block | None = None,
    block_b: Block | None = None,
) -> None:
    """`c` lies within the bound of the exact product at every element."""
    left, right = a.double() * spread(scale_a, block_a, a.shape), b.double() * spread(scale_b, block_b, b.shape)
    exact, size, walk = left @ right, left.abs() @ right.abs(), (left.square() @ right.square()).sqrt()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    k = a.shape[-1]
    chained = k if accumulate == "fast" and block_a is None and block_b is None else min(k, 256)
    interpreted = c.device.type == "cpu"  # sums in float32, and casts to bfloat16 by truncation
    hardware = 0.0 if interpreted else 36 * math.sqrt(chained) * 2.0**-13 * walk
    bound = hardware + (k + 4) * 2.0**-24 * size + HALF_STEP[c.dtype] * (1 + interpreted) * exact.abs() + 1e-30
    assert c.shape == exact.shape
    assert c.is_contiguous()
    worst = ((c.double() - exact).abs() / bound).max().item() if c.numel() else 0.0
    assert worst <= 1.0, f"{worst} times the bound"
