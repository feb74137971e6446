"""Delayed scaling: the scale comes from the amax of earlier steps. Pure functions on (history, scale); nothing is kept here.

    inv_scale = 2^(floor(log2(fmax / a)) - margin)      a = max(history) or history[..., 0]; exponent bits, so devices agree
    inv_scale = (fmax / a) / 2^margin                   power_of_two=False (the rule of flax)

a = 0 or a non-finite keeps the old scale, so that an empty history or an overflowed step never inverts or erases it.
`history` holds amax values in float32, the newest first: [length].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import FormatError, allowed
from fp8fx.formats import Format
from fp8fx.numerics.scaling import divide, inverse

ALGORITHMS = ("max", "most_recent")
ORDERS = ("scale_first", "history_first")


def delayed_scale(
    history: Tensor,
    scale: Tensor,
    format: str | torch.dtype | Format,
    algorithm: str = "max",
    margin: int = 0,
    power_of_two: bool = True,
) -> Tensor:
    """The scale (dequantization multiplier, float32, shape ()) that `history` [length] asks for; the old `scale` where it asks nothing.

    margin: octaves of headroom. Raises FormatError for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise FormatError(f"unknown amax algorithm {algorithm!r}; allowed: {allowed(ALGORITHMS)}")
    amax = (history.amax(-1) if algorithm == "max" else history[..., 0]).float()
    usable = (amax > 0.0) & (amax < math.inf)
    safe = torch.where(usable, amax, 1.0)
    quotient = divide(torch.full_like(safe, formats.get(format).max), safe)
    if power_of_two:
        # Exponent bits are floor(log2) of a normal number; the clamp keeps inv_scale and scale normal.
        exponent = ((quotient.view(torch.int32) >> 23) - margin).clamp(1, 253)
        new = ((254 - exponent) << 23).view(torch.float32)  # 1 / 2^(e - 127) = 2^(127 - e)
    else:
        inv_scale = quotient * 2.0**-margin
        new = inverse(inv_scale.clamp(2.0**-126, 2.0**126))
    return torch.where(usable, new, scale)


def roll(history: Tensor, amax: Tensor) -> Tensor:
    """`history` with everything one step older and `amax` written in front; the oldest value leaves."""
    return torch.cat([amax.to(history.dtype).reshape(*history.shape[:-1], 1), history[..., :-1]], dim=-1)


def delayed_update(
    history: Tensor,
    scale: Tensor,
    amax: Tensor,
    format: str | torch.dtype | Format,
    algorithm: str = "max",
    margin: int = 0,
    power_of_two: bool = True,
    order: str = "scale_first",
) -> tuple[Tensor, Tensor]:
    """One step: (new history, new scale). `amax` is that of the step just measured.

    order `scale_first`: the scale comes from the history as it was, then amax is written (IPEX, which renews it after it quantized; and
    flax within one call, whose scale is renewed before it quantizes: at the start of a step, as fp8fx calls it, that is `history_first`).
    `history_first`: amax is written and counts at once (TransformerEngine's update at the end of a step).
    """
    if order not in ORDERS:
        raise FormatError(f"unknown order {order!r}; allowed: {allowed(ORDERS)}")
    rolled = roll(history, amax)
    read = rolled if order == "history_first" else history
    return rolled, delayed_scale(read, scale, format, algorithm, margin, power_of_two)
