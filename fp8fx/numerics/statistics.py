"""What of a tensor its scale is made from: per tensor, row or block, one number that is the same on every device.

    max          max |x|
    mean         mean |x|
    percentile   the least |x| that at least p percent of the elements do not exceed: a value that occurs, nothing is interpolated
    mse          f * max |x|, with f of FRACTIONS the one whose codes have the least sum of squared errors; of OCTAVES where scales are
                 powers of two: those are all the scales that the others would round to, and the next one above

All over the finite elements, and 0 where there is none. Sums are integers (int64), so that their order does not matter: an |x| counts in
units of 2^-b of the power of two above max |x|, with b = 61 - log2 of how many are added, and a squared error in units of its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fp8fx.spec import Granularity

# From 2^(1/4) down to 2^-5 in eighths of an octave: the coarsest step, 9 percent, leaves the best error within a percent or so.
FRACTIONS = tuple(2.0 ** (k / 8) for k in range(2, -41, -1))
# Twice max |x| is under the next power of two, which under e8m0 is the first at which nothing saturates.
OCTAVES = tuple(2.0**k for k in range(1, -6, -1))
_BITS = 61


def grouped(x: Tensor, granularity: Granularity, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """|x| as [..., n], the elements under one scale last; float32, -1 for what does not count: NaN, inf, the padding of edge blocks."""
    magnitude = x.detach().float().abs()
    magnitude = torch.where(magnitude < math.inf, magnitude, -1.0)
    return _grouped(magnitude, granularity, dims, -1.0)


def _grouped(x: Tensor, granularity: Granularity, dims: tuple[int, ...], padding: float) -> Tensor:
    if granularity == "tensor":
        return x.reshape(-1)
    if isinstance(granularity, str):
        reduced = sorted({dim % max(x.dim(), 1) for dim in dims}) if x.dim() else []
        return x.movedim(reduced, list(range(-len(reduced), 0))).flatten(-len(reduced)) if reduced else x.reshape(1)
    rows, columns = granularity
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows), value=padding)
    high, wide = padded.shape[-2] // rows, padded.shape[-1] // columns
    return padded.reshape(*x.shape[:-2], high, rows, wide, columns).transpose(-3, -2).flatten(-2)


def mean(groups: Tensor) -> Tensor:
    """The mean of what `grouped` gives, over its last dimension; float32."""
    if groups.shape[-1] == 0:
        return groups.new_zeros(groups.shape[:-1])
    counts = groups >= 0.0
    unit = _above(groups.amax(-1, keepdim=True).clamp(min=0.0)) * 2.0 ** -_bits(groups.shape[-1])
    total = torch.where(counts, (groups.double() / unit).round(), 0.0).to(torch.int64).sum(-1)
    return (total.double() * unit.squeeze(-1) / counts.sum(-1).clamp(min=1).double()).float()


def percentile(groups: Tensor, percent: float) -> Tensor:
    """Of what `grouped` gives, over its last dimension; float32."""
    if groups.shape[-1] == 0:
        return groups.new_zeros(groups.shape[:-1])
    ordered = groups.sort(-1).values  # what does not count comes first
    counts = (groups >= 0.0).sum(-1, keepdim=True)
    rank = (counts.double() * (percent / 100.0)).ceil().to(torch.int64)
    index = groups.shape[-1] - counts + torch.minimum(rank, counts).clamp(min=1) - 1
    return ordered.gather(-1, index.clamp(max=groups.shape[-1] - 1)).squeeze(-1).clamp(min=0.0)


def least_error(
    largest: Tensor,
    error: Callable[[Tensor], Tensor],
    granularity: Granularity,
    dims: tuple[int, ...],
    fractions: tuple[float, ...] = FRACTIONS,
) -> Tensor:
    """The f * `largest`, f of `fractions`, with the least error; `largest` is as `amax` gives it, and so is the result.

    error: from a maximum, shaped as `largest`, to the float32 errors of all elements, x's shape; those of NaN and inf are 0.
    """
    best, best_error = largest, torch.zeros_like(largest, dtype=torch.int64)
    for n, fraction in enumerate(fractions):
        value = largest * torch.full_like(largest, fraction)
        errors = _grouped(error(value), granularity, dims, 0.0).double()
        unit = _above(largest).reshape(errors.shape[:-1]).unsqueeze(-1)
        squared = (errors / unit).square().clamp(max=1.0) * 2.0 ** _bits(errors.shape[-1])
        total = squared.round().to(torch.int64).sum(-1).reshape(largest.shape)
        less = total < best_error if n else torch.ones_like(total, dtype=torch.bool)
        best, best_error = torch.where(less, value, best), torch.where(less, total, best_error)
    return best


def _bits(count: int) -> int:
    """Bits of one summand, so that `count` of them fit."""
    return _BITS - max(count, 1).bit_length()


def _above(x: Tensor) -> Tensor:
    """The power of two above float32 x >= 0, as float64; 2^-126 at least."""
    exponent = ((x.view(torch.int32) >> 23) + 1).clamp(min=1)
    return ((exponent.to(torch.int64) + (1023 - 127)) << 52).view(torch.float64)
