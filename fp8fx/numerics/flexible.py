"""Formats of 8 bits with a free maximum, for studies: a float grid with a possibly fractional bias, and INT8.

    M = clamp(round(m), 1, 6)      E = 7 - M      bias = 2^E - log2(maxval) + log2(2 - 2^-M) - 1
    p = max(floor(log2|x| + bias), 1)      s = 2^(p - M - bias)      y = round(x / s) * s,   |x| <= maxval

(Kuzmin et al., "FP8 Quantization: The Power of the Exponent", 2022.) No code is kept for NaN here. Roundings pass gradients
straight through; maxval gets its gradient from saturated elements and from s, so that both can be learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flexible_quantize(x: Tensor, maxval: Tensor | float, mantissa_bits: Tensor | float) -> Tensor:
    """`x` on the grid of 1 sign bit, 7 - M exponent bits and M mantissa bits whose largest value is `maxval`; x's dtype and shape."""
    maxval = torch.as_tensor(maxval, dtype=x.dtype, device=x.device)
    m = _round_straight_through(torch.as_tensor(mantissa_bits, dtype=x.dtype, device=x.device)).clamp(1.0, 6.0)
    bias = 2.0 ** (7.0 - m) - maxval.log2() + (2.0 - 2.0**-m).log2() - 1.0
    bounded = torch.minimum(torch.maximum(x, -maxval), maxval)
    # log2 of zero is -inf, and the clamp puts it with the subnormals.
    p = (bounded.detach().abs().log2() + bias.detach()).floor().clamp(min=1.0)
    step = 2.0 ** (p - m - bias)
    return _round_straight_through(bounded / step) * step


def int8_quantize(x: Tensor, maxval: Tensor | float) -> Tensor:
    """`x` on the symmetric grid of 255 integers times maxval / 127; x's dtype and shape."""
    step = torch.as_tensor(maxval, dtype=x.dtype, device=x.device) / 127.0
    return _round_straight_through(x / step).clamp(-127.0, 127.0) * step


def _round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def search_flexible(x: Tensor) -> tuple[float, int]:
    """(maxval, M) with the least mean square error on `x`: maxval in linspace(0.1, 1.2, 111) * max|x|, M in 1..6.

    An all-zero or empty `x` has no range to search: (1.0, 3).
    """
    largest = float(x.abs().max()) if x.numel() else 0.0
    best = (math.inf, 1.0, 3)
    if largest > 0.0:
        for mantissa_bits in range(1, 7):
            for maxval in (torch.linspace(0.1, 1.2, 111, dtype=torch.float64) * largest).tolist():
                error = float((flexible_quantize(x, maxval, mantissa_bits) - x).square().mean())
                best = min(best, (error, maxval, mantissa_bits))
    return best[1], best[2]
