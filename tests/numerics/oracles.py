"""Inputs and independent references for the numerics tests: gfloat, ml_dtypes, and the inputs that decide a rounding."""

from __future__ import annotations

import math

import gfloat
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.formats import Format
from fp8fx.numerics.specification import grid

ALL_FORMATS = (*formats.TABLE, "e4m2", "e3m3", "e5m1", "e6m1", "e2m4fn", "e3m2fnuz", "e1m3", "e1m6fn", "e5m2fn", "e7m0fn", "e4m0fnuz")
# gfloat 0.5 gives a format whose normal codes are all special, like e1m3, a wrong maximum (1.875 for 7 * 2^-2).
GFLOAT_FORMATS = tuple(name for name in ALL_FORMATS if name != "e1m3")
DETERMINISTIC = ("nearest_even", "nearest_away", "toward_zero", "up", "down")
ML_DTYPES = {
    "e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e4m3ieee": "float8_e4m3",
    "e3m4ieee": "float8_e3m4",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
}
_GFLOAT_MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
    "stochastic": gfloat.RoundMode.StochasticFastest,  # up where r + bits / 2^32 >= 1: with 32 bits, our definition
}


def all_values(dtype: torch.dtype) -> Tensor:
    """Every one of the 65,536 values of a 16-bit dtype, NaN and inf included."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def decisive(name: str | Format, dtype: torch.dtype = torch.float64) -> Tensor:
    """Where a rounding turns: grid values, midpoints, both neighbours of each in `dtype`, both signs, and what lies outside."""
    values = torch.tensor(grid(formats.get(name)), dtype=torch.float64)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, values[-1:] * 1.5, values[-1:] * 1000, values[1:2] / 1024]).to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    extremes = torch.tensor([0.0, math.inf, math.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 5e-324], dtype=dtype)
    points = torch.cat([points, extremes])
    return torch.cat([points, -points])


def gfloat_format(format_: Format) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        format_.name,
        format_.bits,
        format_.mantissa_bits + 1,
        bias=int(format_.bias),
        is_signed=format_.signed,
        domain=gfloat.Domain.Extended if format_.has_inf else gfloat.Domain.Finite,
        has_nz=format_.signed_zero,
        num_high_nans={"ieee": 2**format_.mantissa_bits - 1, "fn": 1, "fnuz": 0, "none": 0}[format_.nan],
        has_subnormals=True,
        is_twos_complement=False,
    )


def gfloat_round(x: Tensor, name: str, rounding: str, overflow: str, random_bits: Tensor | None = None) -> Tensor:
    """gfloat's answer in float32. Its vectorised form; NaN, which it refuses where a format has none, is put back afterwards."""
    info, values = gfloat_format(formats.get(name)), x.double().numpy()
    nan = np.isnan(values)
    bits = () if random_bits is None else (random_bits.numpy(), 32)
    with np.errstate(over="ignore"):
        rounded = gfloat.round_ndarray(info, np.where(nan, 0.0, values), _GFLOAT_MODES[rounding], overflow == "saturate", *bits)
    return torch.from_numpy(np.where(nan, np.nan, rounded)).float()


def ml_dtypes_codes(x: Tensor, name: str) -> Tensor:
    """ml_dtypes' codes (nearest-even, overflow as IEEE) as uint8."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.float().numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).view(np.uint8).copy())


def ml_dtypes_values(x: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.float().numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float32))


def mismatches(got: Tensor, expected: Tensor) -> Tensor:
    """Indices where the float32 bits differ; one NaN equals another, -0 does not equal +0."""
    assert got.dtype == expected.dtype == torch.float32
    assert got.shape == expected.shape
    same = (got.view(torch.int32) == expected.view(torch.int32)) | (got.isnan() & expected.isnan())
    return (~same).nonzero().flatten()


def assert_same(got: Tensor, expected: Tensor, x: Tensor) -> None:
    """Bits equal; on failure the first inputs that differ are shown."""
    wrong = mismatches(got, expected)
    rows = [f"{x[i].item()!r}: got {got[i].item()!r}, expected {expected[i].item()!r}" for i in wrong[:8]]
    assert len(wrong) == 0, f"{len(wrong)} of {x.numel()} differ\n" + "\n".join(rows)
