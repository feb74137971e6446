"""Every bfloat16 through 50 formats and six roundings, bit for bit as gfloat has it; and the formats that gfloat has not, by definition.

gfloat has no negative numbers for unsigned formats, and no fractional biases. So the first see gfloat for the other half of the inputs,
and the second on the grid of the next lower whole bias, whose values are multiplied by the factor in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from numerics.oracles import DETERMINISTIC, all_values, assert_same, decisive, gfloat_round
from torch import Tensor

import fp8fx
from fp8fx import formats
from fp8fx.errors import FormatError
from fp8fx.numerics import decode, encode, round_to_format
from fp8fx.numerics.encoding import _decode_bits, _encode_bits
from fp8fx.numerics.specification import round_value

SIGNED = [
    "e4m3fn",
    "e5m2",
    "e4m3ieee",
    "e3m4ieee",
    "e3m4fn",
    "e2m5",
    "e4m3fnuz",
    "e5m2fnuz",
    "e3m2",
    "e2m3",
    "e2m1",
    "e4m2",
    "e3m3",
    "e5m1",
    "e6m1",
    "e2m4fn",
    "e3m2fnuz",
    "e1m6fn",
    "e5m2fn",
    "e7m0fn",
    "e4m0fnuz",
    "e4m3none",
    "e3m4none",
    "e2m5none",
    "e5m2none",
    "e1m6none",
    "e6m1fn",
    "e3m3fn",
    "e2m4none",
    "e2m5fnuz",
    "e2m2fn",
    "e3m1none",
    "e4m1fn",
    "e1m2none",
    "e2m0none",
    "e4m3b11fnuz",
    "e4m3b4fn",
    "e5m2b20",
    "e3m4b-2",
    "e2m1b3",
    "e4m3b15none",
    "int8",
    "int7",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
]
UNSIGNED = ["ue4m4", "ue5m3fn", "ue3m5none", "ue2m6", "ue2m1", "ue4m3fn", "ue1m7none", "ue4m4b9fn"]
FRACTIONAL = ["e4m3b6.5", "e5m2b14.25fn", "e3m4b3.75none", "e2m5b0.1", "e2m1b1.9", "e4m3b8.3fnuz", "ue4m4b6.3"]
MODES = (*DETERMINISTIC, "stochastic")
BFLOAT16 = all_values(torch.bfloat16)
BITS = torch.randint(0, 2**32, BFLOAT16.shape, dtype=torch.int64, generator=torch.Generator().manual_seed(0))


def policies(name: str) -> list[str]:
    return ["saturate"] if formats.get(name).nan == "none" else ["saturate", "nonfinite"]


def check(x: Tensor, name: str, bits: Tensor, expected: str, factor: float = 1.0) -> None:
    """`x` against gfloat's rounding of x / factor to the format called `expected`."""
    for rounding in MODES:
        for overflow in policies(name):
            random_bits = bits if rounding == "stochastic" else None
            wanted = (gfloat_round(x.double() / factor, expected, rounding, overflow, random_bits).double() * factor).float()
            got = round_to_format(x, name, rounding, overflow, random_bits)
            assert_same(got, wanted, x)
            if rounding == "nearest_even":
                assert_same(decode(encode(got, name), name), torch.where(got.isnan(), _nan_of(name), got), x)


def _nan_of(name: str) -> float:
    """What NaN reads as when it was encoded: 0 or -0 where there is none."""
    format_ = formats.get(name)
    return math.nan if format_.nan != "none" else -0.0 if format_.signed_zero else 0.0


def test_there_are_enough() -> None:
    assert len({formats.get(name) for name in SIGNED}) == len(SIGNED) >= 40


@pytest.mark.parametrize("name", SIGNED)
def test_signed_formats(name: str) -> None:
    check(BFLOAT16, name, BITS, name)


@pytest.mark.parametrize("name", UNSIGNED)
def test_unsigned_formats(name: str) -> None:
    negative = torch.signbit(BFLOAT16.float()) & ~BFLOAT16.isnan()
    check(BFLOAT16[~negative], name, BITS[~negative], name)
    x = BFLOAT16[negative]
    for rounding in MODES:
        saturated = round_to_format(x, name, rounding, "saturate", BITS[negative])
        assert bool((saturated.view(torch.int32) == 0).all()), "+0 each"
    if len(policies(name)) == 2:
        shown = round_to_format(x, name, "nearest_even", "nonfinite")
        assert bool((shown.isnan() == (x.double() < -formats.get(name).min_subnormal / 2)).all())
        assert bool((shown[~shown.isnan()].view(torch.int32) == 0).all())


@pytest.mark.parametrize("name", FRACTIONAL)
def test_fractional_biases(name: str) -> None:
    format_ = formats.get(name)
    assert format_.base is not None
    assert 0.5 < format_.factor < 1.0
    assert format_.min_normal == pytest.approx(2.0 ** (1 - format_.bias), rel=1e-7)
    x = BFLOAT16 if format_.signed else BFLOAT16[~(torch.signbit(BFLOAT16.float()))]
    check(x, name, BITS[: x.numel()], format_.base.name, format_.factor)


@pytest.mark.parametrize("name", [*UNSIGNED[:3], *FRACTIONAL, "int8", "int2"])
def test_where_a_rounding_turns(name: str) -> None:
    """Grid values, midpoints and their neighbours in float32 against the specification; grid values stay in every mode."""
    format_ = formats.get(name)
    x = decisive(name, torch.float32)
    bits = torch.randint(0, 2**32, x.shape, dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    values = torch.tensor(format_.finite_values())
    for rounding in MODES:
        for overflow in policies(name):
            wanted = [round_value(v, format_, rounding, overflow, b) for v, b in zip(x.tolist(), bits.tolist(), strict=True)]
            assert_same(round_to_format(x, name, rounding, overflow, bits), torch.tensor(wanted), x)
        kept = round_to_format(values, name, rounding, random_bits=torch.full(values.shape, 2**32 - 1))
        assert torch.equal(kept, values)


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED, *FRACTIONAL])
def test_codes(name: str) -> None:
    """Both forms of decoding agree with the definition, and every code of a number comes back."""
    format_ = formats.get(name)
    codes = torch.arange(2**format_.bits).to(torch.uint8)
    values = torch.tensor(format_.codes(), dtype=torch.float32)
    assert_same(decode(codes, name), values, codes)
    assert_same(_decode_bits(codes, format_), values, codes)
    numbers = ~values.isnan() & (values >= -format_.max) | values.isinf()
    back = encode(values, name).view(torch.uint8)
    assert torch.equal(back[numbers], codes[numbers])
    if format_.torch_dtype is None and format_.base is None:
        assert torch.equal(_encode_bits(values, format_)[numbers], codes[numbers])


@pytest.mark.parametrize("name", ["e4m3fn", "int4", "ue4m4", "e4m3b6.5"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """The mean of n roundings of x lies within 5 standard deviations of x: s sqrt(r (1 - r) / n), with the step s and r its part.

    The probability is floor(r 2^32) / 2^32, a bias of 2^-32 steps at most, which the bound leaves room for.
    """
    format_, n = formats.get(name), 1 << 16
    bits = torch.randint(0, 2**32, (n,), dtype=torch.int64, generator=torch.Generator().manual_seed(2))
    values = [v for v in format_.finite_values() if v >= 0.0]
    for low, high in zip(values[::16], values[1::16], strict=False):
        for part in (0.03, 0.5, 0.9):
            x = torch.tensor(low + (high - low) * part)
            r = (float(x) - low) / (high - low)
            mean = float(round_to_format(x.expand(n), name, "stochastic", random_bits=bits).double().mean())
            assert abs(mean - float(x)) <= (high - low) * (5 * math.sqrt(r * (1 - r) / n) + 2.0**-32 + 2.0**-23)


@pytest.mark.parametrize("name", ["e4m3b6.5", "ue4m4", "int5", "e4m3b11fnuz"])
def test_compiled(name: str) -> None:
    """One graph each, with the same bits."""
    x = decisive(name, torch.float32)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = fp8fx.quantize(x, name, rounding="nearest_even")
        return codes.view(torch.uint8), fp8fx.dequantize(codes, None, name)

    codes, values = torch.compile(both, fullgraph=True)(x)
    wanted, decoded = both(x)
    assert torch.equal(codes, wanted)
    assert_same(values, decoded, x)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("e4m3b7fn", "e4m3fn"),
        ("e4m3b7", "e4m3ieee"),
        ("e5m2b15", "e5m2"),
        ("e2m1none", "e2m1"),
        ("e4m2ieee", "e4m2"),
        ("e4m3b6.50", "e4m3b6.5"),
    ],
)
def test_names_that_mean_the_same(name: str, canonical: str) -> None:
    assert formats.get(name) is formats.get(canonical)
    assert formats.get(name).name == canonical


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mxfp4", "names a whole role of a recipe.*e2m1"),
        ("int1", "2 to 8 bits"),
        ("int16", "2 to 8 bits"),
        ("ue5m4", "at most 8 bits"),
        ("ue4m4fnuz", "write ue4m4fn"),
        ("e4m3b300", "choose another bias"),
        ("e4m3b-120", "choose another bias"),
        ("ue8m0fn", "choose another bias"),
        ("e4m3fnb7", "optional bias"),
        ("mxfp8_e4m", "Did you mean 'mxfp8_e4m3'"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        formats.get(name)
