"""Rounding to a grid whose largest value, and number of mantissa bits, are learned.

    y = round(clip(x / scale)) * scale        scale = top / fmax         exactly what a recipe with scaling `fixed` computes
    y = clip(x) + s c                         s: the step of the grid at x     c = (y - clip(x)) / s, the rounding error in steps

For gradients c is held constant (straight through), and so is the binade of x. The step s then depends on what is learned as follows.

    x in a binade above the lowest   s = 2^(e - M), e the binade of x    ds/dtop = 0       dlog2(s)/dM = -1
    x in the lowest or subnormal     s = 2^(1 - bias - M)                ds/dtop = s/top   dlog2(s)/dM = -1 - dbias/dM
    x clipped                        y = sign(x) top                     dy/dtop = sign(x) dy/dx = 0

    bias = 2^E - log2(top) + log2(2 - 2^-M) - 1      E = F - M      F: exponent and mantissa bits together, 7 in 8 bits
    dbias/dM = -ln2 2^E + 2^-M / (2 - 2^-M)

E[error^2] is proportional to s^2, so the gradient of a squared error by M is what it costs in expectation to move a bit from the
mantissa to the exponent: finer steps for large elements against a coarser end for small ones. Kuzmin et al. (2022) hold
p = floor(log2|x| + bias) instead of the binade, and fp8fx.numerics.flexible follows them; every element's step then seems to grow with M,
and M can only fall (docs/decisions/0015-search-and-qat.md has figures).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.formats import Format

LN2 = math.log(2.0)


def with_mantissa(format: Format, mantissa_bits: int) -> Format:
    """The format of as many bits as `format`, without codes for NaN, that has `mantissa_bits` of them (at least 1, and 1 exponent bit)."""
    free = format.exponent_bits + format.mantissa_bits
    kept = min(max(mantissa_bits, 1), free - 1)
    return formats.get(f"{'' if format.signed else 'u'}e{free - kept}m{kept}none")


def learned_round(x: Tensor, top: Tensor, format: Format, mantissa_bits: Tensor | None = None) -> Tensor:
    """`x` on the grid of `format` whose largest value is `top` (float32, broadcasts against x); x's shape and dtype.

    mantissa_bits: a float32 scalar; rounded, it replaces the format's own number (`with_mantissa`). All three get gradients.
    Where `top` is NaN or inf the result is NaN, and everywhere if `mantissa_bits` is: what diverged is not lost.
    """
    made = _Relaxed.apply(x, top, mantissa_bits, format)  # type: ignore[no-untyped-call]
    return made  # type: ignore[no-any-return]


class _Relaxed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, mantissa_bits: Tensor | None, format: Format) -> Tensor:
        bits = None if mantissa_bits is None else float(mantissa_bits)
        known = bits is None or math.isfinite(bits)
        used = format if bits is None or not known else with_mantissa(format, round(bits))
        scale = numerics.compute_scale(top, used)
        y = numerics.round_to_format(x.float() * numerics.inverse(scale), used)
        y = y * torch.where(top.isfinite() & known, scale, math.nan)  # compute_scale takes a NaN for 0
        ctx.save_for_backward(x, top, y, mantissa_bits)
        ctx.format = used
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, top, y, mantissa_bits = ctx.saved_tensors
        format, grad = ctx.format, grads[0].float()
        value = x.float()
        clipped = (value.abs() > top) if format.signed else (value > top) | (value < 0.0)
        # The lowest binade has the step of the subnormals; integers have no other.
        low = value.abs() < 2.0 * format.min_normal * (top / format.max)
        error = torch.where(clipped, 0.0, y - value)
        dx = torch.where(clipped, 0.0, grad).to(x.dtype) if ctx.needs_input_grad[0] else None
        dtop = None
        if ctx.needs_input_grad[1]:
            edge = value.sign() if format.signed else (value > 0.0).float()
            dtop = (grad * torch.where(clipped, edge, torch.where(low, error / top.clamp(min=1e-30), 0.0))).sum_to_size(top.shape)
        dm = None
        if mantissa_bits is not None and ctx.needs_input_grad[2]:
            slope = torch.where(low, -1.0 - bias_slope(format), -1.0)
            dm = _inward((grad * error * (LN2 * slope)).sum(), mantissa_bits, format)
        return dx, dtop, dm, None


def bias_slope(format: Format) -> float:
    """dbias/dM of a format without codes for NaN, at a fixed largest value."""
    part = 2.0**-format.mantissa_bits
    return -LN2 * 2.0**format.exponent_bits + part / (2.0 - part)


def _inward(gradient: Tensor, mantissa_bits: Tensor, format: Format) -> Tensor:
    """The gradient, but zero where a step against it would lead further out of the range of mantissa bits."""
    most = format.exponent_bits + format.mantissa_bits - 1
    outward = ((mantissa_bits <= 1.0) & (gradient > 0.0)) | ((mantissa_bits >= most) & (gradient < 0.0))
    return torch.where(outward, 0.0, gradient).reshape(mantissa_bits.shape).to(mantissa_bits.dtype)
