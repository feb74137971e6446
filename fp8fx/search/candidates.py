"""Which format, which largest value: candidates, and their errors on one tensor.

    scale = c * absmax / fmax        c: one of `max_values`, a fraction of the tensor's (row's, block's) largest magnitude
    MSE   = mean((x - round(clip(x / scale)) * scale)^2)        SQNR = 10 log10(mean(x^2) / MSE)

c < 1 clips the tail to make the grid finer where the mass is; c > 1 moves the grid against the data, which helps a format with few
mantissa bits. (Kuzmin et al., "FP8 Quantization: The Power of the Exponent", 2022, search linspace(0.1, 1.2, 111).)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.errors import ModelError
from fp8fx.spec import Granularity

FORMATS = ("e5m2", "e4m3fn", "e3m4fn", "e2m5fn", "int8")
MAX_VALUES = tuple(round(0.1 + 0.05 * i, 2) for i in range(23))  # 0.1 to 1.2


@dataclass(frozen=True)
class Candidate:
    """One way to quantize: `fraction` of the largest magnitude, per tensor, row or block, becomes the largest value of `format`."""

    format: str
    granularity: Granularity = "tensor"
    fraction: float = 1.0

    @property
    def kind(self) -> tuple[str, Granularity]:
        return self.format, self.granularity

    @property
    def text(self) -> str:
        block = self.granularity
        return self.format if block == "tensor" else f"{self.format}/{block if isinstance(block, str) else f'{block[0]}x{block[1]}'}"


@dataclass(frozen=True)
class Found:
    """A candidate and its error: `mse` over the elements, relative to `power`, the mean square of what was to be met."""

    candidate: Candidate
    mse: float
    power: float

    @property
    def sqnr(self) -> float:
        """In dB: inf without an error, -inf without a signal."""
        if self.mse == 0.0:
            return math.inf
        return 10 * math.log10(self.power / self.mse) if self.power else -math.inf


def candidates(formats_: Iterable[str], granularities: Iterable[Any], max_values: Iterable[float]) -> list[Candidate]:
    """The search space: every combination, in the order given. Raises ModelError where it is empty, FormatError for unknown formats."""
    axes = {"formats": _listed(formats_), "granularities": _listed(granularities), "max_values": _listed(max_values)}
    for name, values in axes.items():
        if not values:
            raise ModelError(f"the search space is empty: {name} has no entry")
    names = [formats.get(name).name for name in axes["formats"]]
    fractions = [_fraction(value) for value in axes["max_values"]]
    blocks = [_granularity(value) for value in axes["granularities"]]
    return [Candidate(f, g, c) for f in dict.fromkeys(names) for g in dict.fromkeys(blocks) for c in dict.fromkeys(fractions)]


def _listed(values: Any) -> list[Any]:
    if isinstance(values, str | int | float):
        return [values]
    if isinstance(values, Tensor):
        return values.flatten().tolist()
    return list(values)


def _fraction(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0.0):
        raise ModelError(f"max_values are fractions of the largest magnitude, numbers above 0 (0.1 to 1.2, say); got {value!r}")
    return number


def _granularity(value: Any) -> Granularity:
    named = {"tensor": "tensor", "row": "row", "token": "row", "channel": "row"}
    if isinstance(value, str) and value in named:
        return named[value]
    block = (1, value["group"]) if isinstance(value, dict) and list(value) == ["group"] else value
    if isinstance(block, tuple | list) and len(block) == 2 and all(isinstance(v, int) and v > 0 for v in block):
        return int(block[0]), int(block[1])
    raise ModelError(f"granularities are tensor, row (or token, channel), {{'group': N}} or (rows, columns) of a block; got {value!r}")


def rounded(rows: Tensor, candidate: Candidate, largest: Tensor | None = None) -> Tensor:
    """The matrix `rows` on the candidate's grid, float32. largest: float32 (), of the whole tensor where `rows` is a part of it."""
    amax = numerics.amax(rows, candidate.granularity) if largest is None or candidate.granularity != "tensor" else largest
    scale = numerics.compute_scale(amax * candidate.fraction, candidate.format)
    shape = tuple(rows.shape)
    inverse = numerics.expand_scale(numerics.inverse(scale), candidate.granularity, shape)
    codes = numerics.round_to_format(rows.float() * inverse, candidate.format)
    return codes * numerics.expand_scale(scale, candidate.granularity, shape)


@torch.no_grad()
def errors(rows: Tensor, space: Sequence[Candidate], largest: Tensor | None = None) -> list[Found]:
    """The error of every candidate on the matrix `rows`."""
    x = rows.detach().float()
    power = float(x.double().square().mean())
    return [Found(c, float((rounded(x, c, largest).double() - x.double()).square().mean()), power) for c in space]


def ranked(found: Sequence[Found]) -> list[Found]:
    """The best of each format and granularity, the least error first; of equals, what came first in the search space."""
    best: dict[tuple[str, Granularity], Found] = {}
    for each in found:
        known = best.get(each.candidate.kind)
        if known is None or each.mse < known.mse:
            best[each.candidate.kind] = each
    return sorted(best.values(), key=lambda each: each.mse)


@dataclass(frozen=True)
class FormatSearch:
    """What `search_format` found: `best`, and the best of each format and granularity in `ranking`. Prints as a table."""

    ranking: tuple[Found, ...]
    largest: float

    @property
    def best(self) -> Found:
        return self.ranking[0]

    @property
    def format(self) -> str:
        return self.best.candidate.format

    @property
    def granularity(self) -> Granularity:
        return self.best.candidate.granularity

    @property
    def max_value(self) -> float:
        """The largest value of the grid, in the tensor's units; for rows and blocks, of the one with the largest magnitude."""
        return self.best.candidate.fraction * self.largest

    def __str__(self) -> str:
        lines = [f"{'format':<16} {'max value':>12} {'MSE':>11} {'SQNR':>9}"]
        for each in self.ranking:
            top = each.candidate.fraction * self.largest
            lines.append(f"{each.candidate.text:<16} {top:>12.5g} {each.mse:>11.4g} {each.sqnr:>6.2f} dB")
        return "\n".join(lines)


def search_format(
    x: Tensor,
    formats: Iterable[str] = FORMATS,
    *,
    granularities: Iterable[Any] = ("tensor",),
    max_values: Iterable[float] = MAX_VALUES,
    dims: tuple[int, ...] = (-1,),
) -> FormatSearch:
    """The format, granularity and largest value with the least mean square error on the tensor `x`, of any float dtype and shape.

    formats: names of fp8fx.formats. max_values: fractions of the largest magnitude. dims: what a row or a block's columns run over.
    Raises ModelError for a tensor that is empty, not finite, zero everywhere or of integers, and for an empty search space.
    """
    space = candidates(formats, granularities, max_values)
    check_tensor(x, "search_format(x, ...): x")
    rest = [dim for dim in range(x.dim()) if dim - x.dim() not in dims and dim not in dims]
    kept = [dim for dim in range(x.dim()) if dim not in rest]
    rows = x.detach().permute(*rest, *kept)
    rows = rows.reshape(math.prod(x.shape[dim] for dim in rest), -1)
    largest = float(rows.abs().amax())
    if largest == 0.0:
        raise ModelError(f"search_format(x, ...): all {x.numel()} elements of x are zero, so that every format holds them")
    return FormatSearch(tuple(ranked(errors(rows, space))), largest)


def check_tensor(x: Any, what: str) -> None:
    """ModelError unless `x` is a floating point tensor with elements, all of them finite."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise ModelError(f"{what} must be a floating point tensor, got {kind}")
    if x.numel() == 0:
        raise ModelError(f"{what} has no elements: its shape is {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ModelError(f"{what} is not finite: {int((~x.isfinite()).sum())} of its {x.numel()} elements are NaN or inf")
