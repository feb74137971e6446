from __future__ import annotations

import math

import torch
from torch import nn

from fp8fx.demo.models import GPT, DigitsResNet
from fp8fx.demo.sqnr import layer_sqnr, rounded, sqnr_db, worst
from fp8fx.spec import SiteSpec, TensorSpec

E4M3 = TensorSpec(format="e4m3fn")
E5M2 = TensorSpec(format="e5m2", scaling="none")


def test_sqnr_db() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf
    assert math.isclose(sqnr_db(x, x * 1.1), 20, rel_tol=1e-5)
    assert math.isnan(sqnr_db(x, x / 0))


def test_worst_is_the_lowest_and_nan_is_lower_still() -> None:
    assert worst({"a": 20.0, "b": 10.0}) == ("b", 10.0)
    assert worst({"a": 20.0, "b": math.nan})[0] == "b"  # type: ignore[index]
    assert worst({}) is None


def test_stochastic_rounding_is_measured_deterministically() -> None:
    x = torch.randn(64)
    spec = TensorSpec(format="e5m2", scaling="none", rounding="stochastic")
    assert torch.equal(rounded(x, spec), rounded(x, E5M2))


def test_a_linear_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(32, 64)
    second = model[1]
    x1 = model[0](x)
    expected = sqnr_db(second(x1), nn.functional.linear(rounded(x1, E4M3), rounded(second.weight, E4M3), second.bias))
    assert layer_sqnr(model, {"1": SiteSpec(input=E4M3, weight=E4M3)}, x) == {"1": expected}
    assert 25 < expected < 40


def test_high_precision_roles_are_not_rounded_and_the_model_stays_as_it_was() -> None:
    model = DigitsResNet(8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert layer_sqnr(model, {"conv1": SiteSpec()}, torch.randn(4, 1, 8, 8)) == {"conv1": math.inf}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.conv1._forward_hooks


def test_every_layer_of_a_gpt_lies_where_e4m3_lies() -> None:
    torch.manual_seed(0)
    model = GPT(width=32, layers=1, heads=2, context=16)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = layer_sqnr(model, dict.fromkeys(names, SiteSpec(input=E4M3, weight=E4M3)), torch.randint(256, (4, 16)))
    assert set(found) == set(names)
    assert all(20 < value < 40 for value in found.values())
