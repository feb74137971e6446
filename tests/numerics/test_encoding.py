"""Codes: every code of every format, there and back, against the format table, torch and ml_dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from numerics.oracles import ALL_FORMATS, ML_DTYPES, all_values, assert_same, ml_dtypes_codes

from fp8fx import formats
from fp8fx.errors import FormatError
from fp8fx.numerics import decode, encode, round_to_format
from fp8fx.numerics.encoding import _decode_bits

pytestmark = pytest.mark.core


def every_code(name: str) -> torch.Tensor:
    format_ = formats.get(name)
    codes = torch.arange(2**format_.bits).to(torch.uint8)
    return codes if format_.torch_dtype is None else codes.view(format_.torch_dtype)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_code_decodes_to_the_value_of_the_table_and_encodes_back(name: str) -> None:
    format_, codes = formats.get(name), every_code(name)
    values = decode(codes, name)
    assert_same(values, torch.tensor(format_.codes()), codes.view(torch.uint8))
    back = encode(values, name)
    assert back.dtype == format_.code_dtype
    number = ~values.isnan()
    assert torch.equal(back.view(torch.uint8)[number], codes.view(torch.uint8)[number])
    if format_.nan != "none":
        assert bool(decode(back, name)[~number].isnan().all())


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_the_traceable_decoding_agrees_with_the_table(name: str) -> None:
    codes = every_code(name).view(torch.uint8)
    assert_same(_decode_bits(codes, formats.get(name)), torch.tensor(formats.get(name).codes()), codes)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_of_all_16_bit_inputs_agree_with_ml_dtypes(name: str) -> None:
    """NaN apart, whose code is free in an IEEE format: all ones here and in torch, the quiet bit in ml_dtypes."""
    overflow = "saturate" if formats.get(name).nan == "none" else "nonfinite"
    for x in (all_values(torch.bfloat16), all_values(torch.float16)):
        rounded = round_to_format(x, name, overflow=overflow)
        number = ~rounded.isnan()
        assert torch.equal(encode(rounded, name).view(torch.uint8)[number], ml_dtypes_codes(x, name)[number])


def test_inductor_encodes_and_decodes_the_same() -> None:
    names = ("e4m3fn", "e5m2", "e4m3ieee", "e3m4fn", "e2m5", "e3m2fnuz", "e2m1")
    compiled = torch.compile(
        lambda codes: [(decode(code, name), encode(decode(code, name), name)) for code, name in zip(codes, names, strict=True)],
        fullgraph=True,
        dynamic=False,
    )
    codes = [every_code(name) for name in names]
    for name, code, (values, back) in zip(names, codes, compiled(codes), strict=True):
        assert_same(values, decode(code, name), code.view(torch.uint8))
        number = ~values.isnan()
        assert torch.equal(back.view(torch.uint8)[number], code.view(torch.uint8)[number])


def test_nan_without_a_code_becomes_minus_zero() -> None:
    assert encode(torch.tensor([math.nan]), "e2m1").tolist() == [8]


def test_codes_say_their_format_or_need_it() -> None:
    assert decode(torch.ones(2).to(torch.float8_e5m2)).tolist() == [1.0, 1.0]
    assert decode(torch.tensor([0x38], dtype=torch.uint8), "e4m3fn").tolist() == [1.0]
    with pytest.raises(FormatError, match="pass format="):
        decode(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"float8_e5m2, but format e4m3fn has torch.float8_e4m3fn"):
        decode(torch.ones(2).to(torch.float8_e5m2), "e4m3fn")
    with pytest.raises(FormatError, match="float32 codes"):
        decode(torch.ones(2))


@pytest.mark.parametrize("name", ["e4m3fn", "e2m5"])
def test_any_shape(name: str) -> None:
    for x in (torch.tensor(2.0), torch.empty(0, 3), torch.ones(3, 4).t(), torch.ones(4, 6)[::2, ::3]):
        codes = encode(x, name)
        assert codes.shape == x.shape
        assert torch.equal(decode(codes, name), x)
    strided = encode(torch.arange(8.0).reshape(2, 4) / 4, name).t()
    assert torch.equal(decode(strided, name), torch.arange(8.0).reshape(2, 4).t() / 4)
