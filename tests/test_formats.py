"""The format table against its definition, torch's and ml_dtypes' own tables; names and their errors."""

from __future__ import annotations

import math

import ml_dtypes
import pytest
import torch
from numerics.oracles import ALL_FORMATS, GFLOAT_FORMATS, ML_DTYPES, gfloat_format

from fp8fx import formats
from fp8fx.errors import FormatError

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("name", "layout", "bias", "largest", "min_normal", "min_subnormal", "has_inf"),
    [
        ("e4m3fn", (4, 3), 7, 448.0, -6, -9, False),
        ("e5m2", (5, 2), 15, 57344.0, -14, -16, True),
        ("e4m3ieee", (4, 3), 7, 240.0, -6, -9, True),
        ("e3m4ieee", (3, 4), 3, 15.5, -2, -6, True),
        ("e3m4fn", (3, 4), 3, 30.0, -2, -6, False),
    ],
)
def test_table(name: str, layout: tuple[int, int], bias: int, largest: float, min_normal: int, min_subnormal: int, has_inf: bool) -> None:
    format_ = formats.get(name)
    assert (format_.exponent_bits, format_.mantissa_bits) == layout
    assert (format_.bias, format_.max, format_.has_inf, format_.bits) == (bias, largest, has_inf, 8)
    assert (format_.min_normal, format_.min_subnormal) == (2.0**min_normal, 2.0**min_subnormal)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_the_maximum_and_the_codes_agree(name: str) -> None:
    format_ = formats.get(name)
    codes, half = format_.codes(), 2 ** (format_.bits - 1)
    finite = [value for value in codes[:half] if math.isfinite(value)]
    assert finite == sorted(set(finite)), "codes of non-negative numbers ascend"
    assert finite[-1] == format_.max
    assert name not in GFLOAT_FORMATS or format_.max == gfloat_format(format_).max
    assert any(math.isinf(value) for value in codes) == format_.has_inf
    assert any(math.isnan(value) for value in codes) == (format_.nan != "none")
    assert (math.copysign(1.0, codes[half]) == -1.0 and codes[half] == 0.0) == format_.signed_zero
    if format_.nan_code is not None:
        assert math.isnan(codes[format_.nan_code])
    if format_.inf_code is not None:
        assert codes[format_.inf_code] == math.inf


@pytest.mark.parametrize("name", ML_DTYPES)
def test_finfo_of_ml_dtypes_agrees(name: str) -> None:
    format_, info = formats.get(name), ml_dtypes.finfo(getattr(ml_dtypes, ML_DTYPES[name]))
    assert (format_.max, format_.min_normal, format_.min_subnormal) == (float(info.max), float(info.tiny), float(info.smallest_subnormal))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_torch_dtypes(name: str) -> None:
    format_ = formats.get(name)
    assert format_.torch_dtype is not None
    assert formats.get(format_.torch_dtype) is format_
    assert torch.finfo(format_.torch_dtype).max == format_.max
    values = torch.arange(256).to(torch.uint8).view(format_.torch_dtype).float()
    assert str(values.tolist()).replace("-nan", "nan") == str(format_.codes()).replace("-nan", "nan")


def test_get_returns_one_object_per_name() -> None:
    assert formats.get("e4m2") is formats.get("e4m2")
    assert formats.get(formats.get("e5m2")) is formats.TABLE["e5m2"]
    assert formats.get("e5m2ieee") is formats.TABLE["e5m2"]
    assert str(formats.get("e5m2")) == "e5m2"
    assert formats.get("e2m1ieee").max == 3.0  # while the OCP element format e2m1 goes to 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e4m3", r"e4m3fn \(448\) or e4m3ieee \(240\)"),
        ("e3m4", r"e3m4fn \(30\) or e3m4ieee \(15.5\)"),
        ("e4m3fm", r"allowed: e4m3fn, .* Did you mean 'e4m3fn'\?"),
        ("fp8", "unknown format 'fp8'"),
        ("e5m4", "at most 8 bits"),
        ("e0m7", "at least 1 exponent bit"),
        ("e5m0", "write e5m0fn or fnuz"),
        ("e1m0fn", "no number but zero"),
        (torch.float16, "unknown format torch.float16"),
    ],
)
def test_wrong_names_are_refused_with_what_is_allowed(name: str | torch.dtype, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        formats.get(name)
