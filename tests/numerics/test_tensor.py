"""quantize_tensor: the eager shortcuts and the traceable form store the same bytes, over every input that could tell them apart."""

from __future__ import annotations

import math

import pytest
import torch
from numerics.oracles import all_values, decisive, ml_dtypes_codes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx.errors import FormatError, ModelError
from fp8fx.numerics import dequantize_tensor, encode, inverse, philox_bits, quantize_tensor, round_to_format
from fp8fx.numerics import tensor as tensors
from fp8fx.spec import TensorSpec

pytestmark = pytest.mark.core

DTYPES = (torch.bfloat16, torch.float16)


def spec(text: str) -> TensorSpec:
    return TensorSpec.parse(text)


def inputs(name: str) -> list[Tensor]:
    decided = decisive(name)
    return [all_values(torch.bfloat16), all_values(torch.float16), decided.float(), decided, torch.empty(0, 4), torch.tensor(1.7)]


@pytest.mark.parametrize("scaling", ["none", "current"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m5"])
def test_the_shortcut_stores_the_bytes_of_the_traceable_form(name: str, scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = spec(f"{name}/{scaling}/tensor/nearest_even/saturate")
    scale = torch.tensor(0.37) if scaling == "current" else None  # that of the inputs is set by their largest, and flattens the rest
    fast = [quantize_tensor(x, s, scale=scale) for x in inputs(name)]
    monkeypatch.setattr(tensors, "plain_cpu", lambda x: False)
    for x, (codes, used, largest) in zip(inputs(name), fast, strict=True):
        slow = quantize_tensor(x, s, scale=scale)
        assert torch.equal(codes.view(torch.uint8), slow[0].view(torch.uint8))
        assert torch.equal(used, slow[1])
        assert torch.equal(largest, slow[2])
        assert codes.shape == x.shape


def test_inductor_stores_the_same_bytes() -> None:
    specs = [
        spec("e4m3fn/none/tensor/nearest_even/saturate"),
        spec("e5m2/none/tensor/nearest_even/saturate"),
        spec("e4m3fn/current/row/nearest_even/saturate"),
        spec("e2m5/current/4x8/nearest_even/saturate/power_of_two"),
    ]
    x = torch.cat([all_values(dtype).float() for dtype in DTYPES]).reshape(512, 256)

    def run(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [quantize_tensor(x, s) for s in specs]

    for s, got, expected in zip(specs, torch.compile(run, fullgraph=True, dynamic=False)(x), run(x), strict=True):
        assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8)), s.text
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_unscaled_codes_below_overflow_are_those_of_ml_dtypes(name: str) -> None:
    for dtype in DTYPES:
        x = all_values(dtype)
        codes, scale, _ = quantize_tensor(x, spec(f"{name}/none/tensor/nearest_even/saturate"))
        inside = x.float().abs() <= {"e4m3fn": 464.0, "e5m2": 61439.0}[name]
        assert torch.equal(codes.view(torch.uint8)[inside], ml_dtypes_codes(x, name)[inside])
        assert (scale.item(), scale.shape) == (1.0, ())


def test_the_definition_holds_for_every_granularity() -> None:
    x = torch.randn(20, 36, generator=torch.Generator().manual_seed(0))
    for block, per_element in (("tensor", 1), ("row", 1), ("8x16", (8, 16))):
        codes, scale, _ = quantize_tensor(x, spec(f"e4m3fn/current/{block}/nearest_even/saturate"))
        wide = scale if isinstance(per_element, int) else scale.repeat_interleave(8, 0).repeat_interleave(16, 1)[:20, :36]
        expected = encode(round_to_format(x * inverse(wide), "e4m3fn"), "e4m3fn")
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        y = dequantize_tensor(codes, scale, "e4m3fn", spec(f"e4m3fn/current/{block}/nearest_even/saturate").granularity)
        assert torch.equal(y, codes.float() * wide)
        assert (y - x).norm() < 0.03 * x.norm()


def test_the_largest_element_lands_on_max() -> None:
    x = torch.tensor([0.1, -7.3, 2.0])
    codes, scale, largest = quantize_tensor(x, spec("e5m2/current/tensor/nearest_even/saturate"))
    assert codes.float().tolist()[1] == -57344.0
    assert largest.item() == torch.tensor(7.3).item()
    assert scale.item() == (largest / torch.tensor(57344.0)).item()


def test_nan_and_inf_do_not_move_the_scale() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -2.0])
    codes, scale, largest = quantize_tensor(x, spec("e4m3fn/current/tensor/nearest_even/saturate"))
    assert largest.item() == 2.0
    assert str(dequantize_tensor(codes, scale, "e4m3fn").tolist()) == "[1.0, nan, 2.0, -2.0]"
    codes, *_ = quantize_tensor(torch.full((3,), math.nan), spec("e5m2/current/tensor/nearest_even/saturate"))
    assert bool(codes.float().isnan().all())


def test_zeros_keep_their_sign_and_give_a_usable_scale() -> None:
    codes, scale, largest = quantize_tensor(torch.tensor([0.0, -0.0]), spec("e4m3fn/current/tensor/nearest_even/saturate"))
    assert codes.view(torch.uint8).tolist() == [0, 128]
    assert largest.item() == 0.0
    assert scale.item() > 0.0


def test_stochastic_and_delayed_need_their_arguments() -> None:
    x = torch.randn(8, 8)
    stochastic = spec("e5m2/current/tensor/stochastic/saturate")
    with pytest.raises(FormatError, match="random_bits"):
        quantize_tensor(x, stochastic)
    codes, scale, _ = quantize_tensor(x, stochastic, random_bits=philox_bits(x.shape, 1, 2))
    assert (dequantize_tensor(codes, scale, "e5m2") - x).norm() < 0.2 * x.norm()
    delayed = spec("e4m3fn/delayed/tensor/nearest_even/saturate")
    with pytest.raises(ModelError, match="needs its scale"):
        quantize_tensor(x, delayed)
    codes, scale, largest = quantize_tensor(x, delayed, scale=torch.tensor(0.5))
    assert scale.item() == 0.5
    assert largest == x.abs().max()
    assert torch.equal(codes.float(), round_to_format(x * 2, "e4m3fn"))


def test_autograd_stays_out_and_the_input_is_untouched() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    before = x.detach().clone()
    codes, scale, _ = quantize_tensor(x, spec("e4m3fn/none/tensor/nearest_even/saturate"))
    assert not codes.requires_grad
    assert not scale.requires_grad
    assert torch.equal(x.detach(), before)


def test_a_default_device_does_not_matter() -> None:
    x = torch.randn(40_000, device="cpu")
    for text in ("e4m3fn/current/tensor/nearest_even/saturate", "e2m4/none/tensor/stochastic/saturate"):
        expected = quantize_tensor(x, spec(text), random_bits=philox_bits(x.shape, 1, 2))
        with torch.device("meta"):
            got = quantize_tensor(x, spec(text), random_bits=philox_bits(x.shape, 1, 2))
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one.view(torch.uint8) if one.itemsize == 1 else one, other.view(torch.uint8) if one.itemsize == 1 else other)


def test_fake_tensors_and_make_fx_see_the_traceable_form() -> None:
    s = spec("e4m3fn/current/row/nearest_even/saturate")

    def run(x: Tensor) -> Tensor:
        codes, scale, _ = quantize_tensor(x, s)
        return dequantize_tensor(codes, scale, "e4m3fn")

    with FakeTensorMode():
        assert run(torch.empty(3, 5)).shape == (3, 5)
        assert philox_bits((3, 5), 1, 2).shape == (3, 5)
    example, other = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(make_fx(run)(example)(other), run(other))
