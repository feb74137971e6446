"""The numbers that products and sums are kept in: what `fp8fx.formats` has, and wider ones.

    float32             what nothing is rounded to
    float16, bfloat16   e5m10 and e8m7, by their usual names
    eXmY                X from 2 to 8, Y from 1 to 20, IEEE (inf and NaN); e8m13 is the accumulator of Hopper's FP8 instructions
    e4m3fn, e5m2, ...   every format of fp8fx.formats

Rounding is that of `fp8fx.numerics`. Its two forms shift exponents by the width of the significand, for which eight exponent bits leave no
room: those formats share float32's exponent, so their rounding is one of bits, subnormals included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import FormatError, ModelError, allowed, nearest
from fp8fx.formats import Format
from fp8fx.numerics.eager import tracing
from fp8fx.numerics.rounding import has_magic, round_to_format
from fp8fx.spec import OVERFLOWS, ROUNDINGS

FLOAT32 = Format("float32", 8, 23, 127, torch.finfo(torch.float32).max, True, "ieee")
_NAMES = {"float16": "e5m10", "bfloat16": "e8m7", "float32": "e8m23"}
_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "half": "float16", "float": "float32"}
_CANONICAL = {layout: name for name, layout in _NAMES.items()}
_PATTERN = re.compile(r"e([2-8])m([1-9]|1[0-9]|20)(ieee)?")
_CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# Of `fp8fx.spec.ROUNDINGS` those without random bits: what the Triton kernel has.
MODES = tuple(mode for mode in ROUNDINGS if mode != "stochastic")

_KNOWN: dict[str, Format] = {"float32": FLOAT32}


def number(name: str | torch.dtype | Format) -> Format:
    """The format called `name`, also in its short forms (fp16, bf16, fp32) and as a torch dtype. Raises FormatError."""
    if isinstance(name, Format):
        return name
    if isinstance(name, torch.dtype) and name in (torch.float32, torch.float16, torch.bfloat16):
        name = str(name).removeprefix("torch.")
    if isinstance(name, str):
        name = _SHORT.get(name, name)
        name = _CANONICAL.get(name, name)
        if name not in _KNOWN:
            _KNOWN[name] = _build(name)
        return _KNOWN[name]
    return formats.get(name)


def _build(name: str) -> Format:
    found = _PATTERN.fullmatch(_NAMES.get(name, name))
    if found is not None and 1 + int(found[1]) + int(found[2]) > 8:
        exponent_bits, mantissa_bits = int(found[1]), int(found[2])
        bias = 2 ** (exponent_bits - 1) - 1
        return Format(name, exponent_bits, mantissa_bits, bias, (2.0 - 2.0**-mantissa_bits) * 2.0**bias, True, "ieee")
    try:
        return formats.get(name)
    except FormatError as error:
        if name in formats.AMBIGUOUS:
            raise
        words = (*_NAMES, *formats.TABLE)
        raise FormatError(
            f"unknown number format {name!r}; allowed: {allowed(_NAMES)}, any eXmY with X from 2 to 8 and Y from 1 to 20, or a format of "
            f"fp8fx.formats.{nearest(name, words)}"
        ) from error


def check_mode(rounding: str, overflow: str) -> None:
    """Raise FormatError for a rounding or an overflow policy that sums and products cannot have."""
    if rounding not in ROUNDINGS:
        raise FormatError(
            f"rounding: unknown rounding {rounding!r} of products and sums; allowed: {allowed(ROUNDINGS)}.{nearest(rounding, ROUNDINGS)}"
        )
    if overflow not in OVERFLOWS:
        raise FormatError(f"overflow: unknown overflow policy {overflow!r}; allowed: {allowed(OVERFLOWS)}.{nearest(overflow, OVERFLOWS)}")


Draw = Callable[[], Tensor]  # makes one random word per element: int64 in [0, 2^32)


class Round(Protocol):
    """float32 to the grid of a format; `draw` is called where the rounding is stochastic and something is rounded."""

    def __call__(self, x: Tensor, draw: Draw | None = None) -> Tensor: ...


def rounder(format: Format, rounding: str = "nearest_even", overflow: str = "nonfinite") -> Round:
    """A function that takes float32 tensors to the grid of `format`; the identity for float32. Traceable."""
    if format.mantissa_bits == 23:
        return lambda x, draw=None: x
    if rounding == "stochastic":
        return _stochastic(format, overflow)
    if format.name in _CASTS and rounding == "nearest_even" and overflow == "nonfinite" and not tracing():
        dtype = _CASTS[format.name]  # torch's own cast; Inductor would leave both conversions out
        return lambda x, draw=None: x.to(dtype).float()
    if format.exponent_bits == 8:
        return lambda x, draw=None: round_bits(x, format, rounding, overflow)
    if rounding == "nearest_even" and _in_few_passes(format, overflow):
        return lambda x, draw=None: round_nearest(x, format, overflow)
    return lambda x, draw=None: round_to_format(x, format, rounding, overflow)


def _stochastic(format: Format, overflow: str) -> Round:
    def run(x: Tensor, draw: Draw | None = None) -> Tensor:
        if draw is None:
            raise ModelError(f"rounding: stochastic of products and sums ({format.name}) needs random bits: a seed, or the rng input")
        if format.exponent_bits == 8:
            return round_bits(x, format, "stochastic", overflow, draw())
        return round_to_format(x, format, "stochastic", overflow, draw())

    return run


def _in_few_passes(format: Format, overflow: str) -> bool:
    """`round_nearest` can: ties are in the mantissa, and if it does not end at max the grid goes on with 2^(emax + 1), which is inf."""
    if format.mantissa_bits == 0 or not format.signed_zero or not has_magic(format, torch.float32):
        return False
    return overflow == "saturate" or (format.has_inf and format.max == (2.0 - 2.0**-format.mantissa_bits) * 2.0**format.bias)


def round_nearest(x: Tensor, format: Format, overflow: str) -> Tensor:
    """float32 `x` to the nearest of `format`, ties to even: the magic form of fp8fx.numerics in the fewest passes, for the inner loop.

    What rounds to 2^(emax + 1) becomes inf by a scaling that takes it to 2^128, and back.
    """
    m = format.mantissa_bits
    bound = format.max if overflow == "saturate" else 2.0 ** (format.bias + 1)
    y = x.clamp(-bound, bound)  # NaN passes
    exponent = (y.view(torch.int32) & 0x7F800000).clamp_(min=(format.emin + 127) << 23)
    magic = exponent.add_(((23 - m) << 23) | (1 << 22)).view(torch.float32)
    q = torch.copysign((y + magic).sub_(magic), x)
    return q if overflow == "saturate" else q.mul_(2.0 ** (127 - format.bias)).mul_(2.0 ** (format.bias - 127))


def round_bits(
    x: Tensor, format: Format, rounding: str = "nearest_even", overflow: str = "nonfinite", random_bits: Tensor | None = None
) -> Tensor:
    """float32 `x` on the grid of a format with float32's exponent: the bits below the step go, after what the mode adds to them.

    A carry goes on into the exponent and from the largest number into inf, as it should. random_bits: 32 per element, for `stochastic`;
    the upper ones are added, which carries where those of fp8fx.numerics do: floor(r 2^32) + bits >= 2^32.
    """
    below = 23 - format.mantissa_bits
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    if rounding == "nearest_even":
        magnitude = magnitude + ((magnitude >> below) & 1) + ((1 << (below - 1)) - 1)
    elif rounding == "nearest_away":
        magnitude = magnitude + (1 << (below - 1))
    elif rounding in ("up", "down"):
        away = x > 0.0 if rounding == "up" else x < 0.0
        magnitude = magnitude + away.to(torch.int32) * ((1 << below) - 1)
    elif rounding == "stochastic":
        assert random_bits is not None  # drawn by whoever asks for it
        magnitude = magnitude + (random_bits >> (32 - below)).to(torch.int32)
    y = (magnitude & -(1 << below)).view(torch.float32)
    if overflow == "saturate":
        y = y.clamp(max=format.max)
    return torch.where(x.isnan(), x, torch.copysign(y, x))
