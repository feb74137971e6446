# mypy: allow-untyped-defs, allow-incomplete-defs
"""Scales on the device: current scaling from amax, and its inverse. `x ~ q * scale`; all float32.

    scale     = clamp(max(amax, eps) / fmax, 2^-126, 2^126)
    scale     = 1 / 2^floor(log2(fmax / max(amax, eps)))      power_of_two, by exponent bits
    inv_scale = 1 / scale

Every quotient is the IEEE one, as in the reference (which gets it through float64): Triton's plain float32 division is only
within 2 ulp. Reference: `fp8fx.numerics.compute_scale` and `inverse`, equal bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.formats import Format
from fp8fx.kernels.codes import hardware_format, largest_of
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import cdiv

_SMALLEST = tl.constexpr(2.0**-126)
_LARGEST = tl.constexpr(2.0**126)
_BLOCK = 1024


@triton.jit
def divide(a, b):
    """The IEEE quotient of float32 values: the same bits as through float64, which `/` does not promise."""
    return tl.div_rn(a, b)


@triton.jit
def inverse(scale, POWER_OF_TWO: tl.constexpr = False):
    """1 / scale, correctly rounded. POWER_OF_TWO: scale is one, from 2^-126 to 2^126."""
    if POWER_OF_TWO:
        return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        return divide(tl.where(scale == scale, 1.0, 1.0), scale)  # ones of its shape, in Triton and in Gluon alike


@triton.jit
def current_scale(amax, eps, FMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of float32 `amax`; a non-finite amax counts as 0. eps: a float32 scalar."""
    return finite_scale(tl.where(amax < float("inf"), amax, 0.0), eps, FMAX, POWER_OF_TWO)


@triton.jit
def finite_scale(amax, eps, FMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The same of an amax that is finite, as eps is."""
    amax = tl.where(amax < eps, eps, amax)
    if POWER_OF_TWO:
        # Without a division: fmax is 1.75 * 2^n for both formats, so floor(log2(fmax / amax)) is the difference of the exponents, less 1
        # if amax has a significand above 1.75, for which adding 0x1FFFFF carries. Rounding the quotient does not change that.
        tl.static_assert(FMAX == 448.0 or FMAX == 57344.0)
        exponent = 254 + (8 if FMAX == 448.0 else 15) - ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23)
        scale = ((254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.minimum(tl.maximum(divide(amax, tl.zeros_like(amax) + FMAX), _SMALLEST), _LARGEST)
    return scale


@triton.jit
def largest_part(parts_ptr, PARTS: tl.constexpr):
    """The amax of a tensor from PARTS partial ones, a power of two: see `amax_parts`."""
    return largest_of(tl.load(parts_ptr + tl.arange(0, PARTS)))


@triton.jit
def _scale_kernel(amax_ptr, scale_ptr, n, eps, FMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amax = tl.load(amax_ptr + at, mask=at < n, other=1.0)
    tl.store(scale_ptr + at, current_scale(amax, eps, FMAX, POWER_OF_TWO), mask=at < n)


def compute_scale(amax: Tensor, format: str | Format, power_of_two: bool = False, eps: float = 1e-12) -> Tensor:
    """Current scaling of float32 `amax` of any shape: float32 of that shape, contiguous."""
    amax = amax.contiguous()
    scale = torch.empty_like(amax)
    if (n := amax.numel()) > 0:
        fmax = hardware_format(format).max
        constexprs = {"FMAX": fmax, "POWER_OF_TWO": power_of_two, "BLOCK": _BLOCK}
        launch(_scale_kernel, (cdiv(n, _BLOCK),), (amax, scale, n, eps), constexprs)
    return scale
