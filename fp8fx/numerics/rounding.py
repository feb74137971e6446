"""Rounding to a format: any float tensor to float32 values on the format's grid. Traceable by Dynamo and Inductor.

The grid of a format with mantissa bits M has the step 2^(max(floor(log2|x|), emin) - M) around x. Two forms:

*magic*, nearest-even only: adding 1.5 * 2^(e + p - M) pushes every bit below the step out of the significand of p bits, the
processor's own rounding does the rest, and subtracting gives the value back. Exact for every input (numerics docs), where that number is
one of the dtype: formats that reach 2^(bias - p + M + 1), bias the dtype's, take the other form.
*steps*, every mode: |x| = (k + r) * step with k = floor; the mode says from k and r whether k becomes k + 1. Each operation
is a scaling by a power of two or exact by size, so nothing is rounded twice.

float64 inputs go through the same forms in float64 (p = 52), never through float32 first, which would round twice. float16,
bfloat16 and the float8 types convert to float32 exactly. Formats are Python constants here: with symbolic exponent and
mantissa widths Inductor flushed subnormals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import FormatError, ModelError, allowed, nearest
from fp8fx.formats import Format
from fp8fx.numerics.eager import CHUNK, in_chunks, plain_cpu
from fp8fx.spec import OVERFLOWS, ROUNDINGS

# float dtype -> (integer dtype of its bits, mantissa bits, exponent bias)
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def round_to_format(
    x: Tensor,
    format: str | torch.dtype | Format,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    random_bits: Tensor | None = None,
) -> Tensor:
    """Values of `format` nearest to `x` in the sense of `rounding`; float32, same shape.

    x: any float dtype and shape. random_bits: int32 or int64 of x's shape holding 32 random bits each, for `stochastic` only.
    overflow `saturate`: inf and what rounds beyond max become +-max. `nonfinite`: what rounds beyond max becomes inf, or NaN
    where the format has no inf; `toward_zero` keeps max, `up` keeps -max and `down` keeps +max for finite x. In a format without
    a sign a negative number becomes 0, and under `nonfinite` NaN unless it rounds to 0.
    NaN gives NaN; -0 stays -0, or becomes +0 in a format without it.
    No gradient passes (`fp8fx.fake_quantize` has one).
    Raises ModelError for integer x, FormatError for an unknown mode or one that the format cannot do.
    """
    format = formats.get(format)
    check(x, format, rounding, overflow, random_bits)
    x = x.detach()
    if plain_cpu(x) and x.numel() > CHUNK:
        tensors = (x,) if random_bits is None else (x, random_bits.expand(x.shape))
        return in_chunks(lambda x, bits=None: _round(x, format, rounding, overflow, bits), torch.float32, *tensors)
    return _round(x, format, rounding, overflow, random_bits)


def _round(x: Tensor, format: Format, rounding: str, overflow: str, random_bits: Tensor | None) -> Tensor:
    if format.base is not None:
        y = _round_grid(_on_grid(x, format, snap=not rounding.startswith("nearest")), format.base, rounding, overflow, random_bits)
        return (y * format.factor).float()
    return _round_grid(x if x.dtype == torch.float64 else x.float(), format, rounding, overflow, random_bits).float()


def _on_grid(x: Tensor, format: Format, snap: bool) -> Tensor:
    """x in units of the format's factor, float64. snap: a value of the format, itself rounded to float32, is the grid value it means."""
    t = x.double() / torch.full((), format.factor, dtype=torch.float64, device=x.device)  # a tensor: CUDA multiplies by 1 / a number
    if not snap:
        return t
    below = 52 - format.mantissa_bits  # bits below those of a grid value: what they hold is its rounding to float32
    near = ((t.view(torch.int64) + (1 << (below - 1))) & -(1 << below)).view(torch.float64)
    return torch.where((near * format.factor).float() == x, near, t)


def _round_grid(x: Tensor, format: Format, rounding: str, overflow: str, random_bits: Tensor | None) -> Tensor:
    """float32 or float64 x with a format whose bias is whole; x's dtype."""
    if rounding == "nearest_even" and has_magic(format, x.dtype):
        y = _magic(x, format, overflow)
    else:
        y = _steps(x, format, rounding, overflow, random_bits)
    if not format.signed:  # y may still be negative: the sign was never asked for
        y = torch.where(y < 0.0, 0.0 if overflow == "saturate" else math.nan, y)
    return y


def check(x: Tensor, format: Format, rounding: str, overflow: str, random_bits: Tensor | None) -> None:
    """Raise what `round_to_format` says it raises."""
    if not x.is_floating_point():
        raise ModelError(f"cannot round a {x.dtype} tensor to {format.name}: expected a floating point tensor; convert it with .float()")
    if rounding not in ROUNDINGS:
        raise FormatError(f"unknown rounding {rounding!r}; allowed: {allowed(ROUNDINGS)}.{nearest(rounding, ROUNDINGS)}")
    if overflow not in OVERFLOWS:
        raise FormatError(f"unknown overflow policy {overflow!r}; allowed: {allowed(OVERFLOWS)}.{nearest(overflow, OVERFLOWS)}")
    if rounding == "stochastic" and random_bits is None:
        raise FormatError("rounding 'stochastic' needs random_bits (see philox_bits)")
    if overflow == "nonfinite" and format.nan == "none":
        raise FormatError(f"format {format.name} has neither inf nor NaN: overflow must be 'saturate'")


def has_magic(format: Format, dtype: torch.dtype) -> bool:
    """The magic numbers of the format's largest binade, and of the one beyond, are numbers of `dtype`."""
    _, p, bias = _LAYOUT[dtype]
    return math.frexp(format.beyond)[1] - 1 + p - format.mantissa_bits <= bias


def _magic(x: Tensor, format: Format, overflow: str) -> Tensor:
    integer, p, bias = _LAYOUT[x.dtype]
    bound = format.max if overflow == "saturate" else format.beyond
    y = x.clamp(-bound, bound)  # NaN passes
    exponent = (y.view(integer) & ((2 * bias + 1) << p)).clamp(min=(format.emin + bias) << p)
    magic = exponent + (((p - format.mantissa_bits) << p) | (1 << (p - 1)))
    if format.mantissa_bits == 0:  # a tie goes to the even *code*, which counts exponents: an odd magic number exchanges even and odd
        odd = (exponent >> p) & 1
        magic = magic + (1 - odd if (format.emin + bias) % 2 else odd)  # the code of the lowest exponent is 1
    magic = magic.view(x.dtype)
    q = (y + magic) - magic  # zero comes out as +0, which is what a format without -0 wants
    if format.signed_zero:
        q = torch.copysign(q, x)
    if overflow == "nonfinite":
        q = torch.where(q.abs() > format.max, torch.copysign(torch.full_like(q, math.inf if format.has_inf else math.nan), q), q)
    return q


def _steps(x: Tensor, format: Format, rounding: str, overflow: str, random_bits: Tensor | None) -> Tensor:
    integer, p, bias = _LAYOUT[x.dtype]
    m = format.mantissa_bits
    a = x.abs().clamp(max=2.0 * format.max)  # above max, and so that 2^(m - e) below stays normal for a max of 2^125
    e = (a.view(integer) >> p).clamp(format.emin + bias, 2 * bias)  # biased exponent of the step's binade; NaN has 2 * bias + 1
    t = a * ((2 * bias + m - e) << p).view(x.dtype)
    r = t.frac()  # not t - t.floor(): torch hands floor to MKL's threads, which cost milliseconds on a busy machine
    k = t - r
    up = _rounds_up(x, k, r, rounding, e - (format.emin + bias) if m == 0 else None, random_bits)
    y = torch.where(up, k + 1.0, k) * ((e - m) << p).view(x.dtype)
    y = torch.where(y > format.max, _overflowed(x, format, rounding, overflow), y)
    return torch.copysign(y, x) if format.signed_zero else torch.where(y == 0.0, torch.zeros_like(y), torch.copysign(y, x))


def _rounds_up(x: Tensor, k: Tensor, r: Tensor, rounding: str, parity: Tensor | None, random_bits: Tensor | None) -> Tensor:
    """Whether the magnitude (k + r) steps becomes k + 1 steps; bool, x's shape. `parity` adds to k's for `nearest_even`."""
    if rounding == "nearest_even":
        odd = ((k.to(torch.int32) + (0 if parity is None else parity)) & 1).bool() & (k > 0.0)
        return (r > 0.5) | ((r == 0.5) & odd)
    if rounding == "nearest_away":
        return r >= 0.5
    if rounding == "up":
        return (r > 0.0) & (x > 0.0)
    if rounding == "down":
        return (r > 0.0) & (x < 0.0)
    if rounding == "toward_zero":
        return torch.zeros_like(r, dtype=torch.bool)
    assert random_bits is not None  # `check` refused it
    # Probability r: the 32 bits below the last kept bit plus 32 random bits carry out with probability floor(r 2^32) / 2^32.
    return (r * 4294967296.0).to(torch.int64) + (random_bits.to(torch.int64) & 0xFFFFFFFF) >= 4294967296


def _overflowed(x: Tensor, format: Format, rounding: str, overflow: str) -> Tensor:
    """The magnitude of what rounds beyond max, x's shape."""
    largest = torch.full_like(x, format.max)
    if overflow == "saturate":
        return largest
    beyond = torch.full_like(x, math.inf if format.has_inf else math.nan)
    if rounding in ("nearest_even", "nearest_away", "stochastic"):
        return beyond
    toward = {"toward_zero": x.abs() < math.inf, "up": (x < 0.0) & (x > -math.inf), "down": (x > 0.0) & (x < math.inf)}
    return torch.where(toward[rounding], largest, beyond)
