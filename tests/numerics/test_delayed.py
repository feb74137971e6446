"""Delayed scaling: the check vectors, and the mistakes known from elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from fp8fx.errors import FormatError
from fp8fx.numerics import delayed_scale, delayed_update

pytestmark = pytest.mark.core

ONE = torch.ones(())


@pytest.mark.parametrize(
    ("name", "amax", "inv_scale"),
    [
        ("e4m3fn", 0.001, 262144.0),
        ("e4m3fn", 0.5, 512.0),
        ("e4m3fn", 1.0, 256.0),
        ("e4m3fn", 3.0, 128.0),
        ("e4m3fn", 448.0, 1.0),
        ("e4m3fn", 449.0, 0.5),
        ("e4m3fn", 1000.0, 0.25),
        ("e5m2", 1.0, 32768.0),
        ("e5m2", 3.0, 16384.0),
        ("e5m2", 1e5, 0.5),
    ],
)
def test_check_vectors(name: str, amax: float, inv_scale: float) -> None:
    scale = delayed_scale(torch.tensor([amax, 0.0]), ONE, name)
    assert 1.0 / scale.item() == inv_scale
    assert 1.0 / delayed_scale(torch.tensor([amax]), ONE, name, margin=2).item() == inv_scale / 4


def test_max_and_most_recent() -> None:
    history = torch.tensor([1.0, 100.0, 3.0])
    assert delayed_scale(history, ONE, "e4m3fn", "max").item() == 1 / 4
    assert delayed_scale(history, ONE, "e4m3fn", "most_recent").item() == 1 / 256
    with pytest.raises(FormatError, match="max or most_recent"):
        delayed_scale(history, ONE, "e4m3fn", "mean")


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_an_unusable_amax_keeps_the_old_scale(amax: float, power_of_two: bool) -> None:
    """Elsewhere an infinite amax, or a history of zeros, inverted the stored scale."""
    old = torch.tensor(0.37)
    assert delayed_scale(torch.tensor([amax, amax]), old, "e4m3fn", power_of_two=power_of_two).item() == old.item()


def test_flax_rule() -> None:
    scale = delayed_scale(torch.tensor([3.0]), ONE, "e4m3fn", margin=1, power_of_two=False)
    inv_scale = torch.tensor(448.0) / torch.tensor(3.0) / 2
    assert scale.item() == (1.0 / inv_scale).item()


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("amax", [1e-45, 1e-38, 3e38])
def test_extreme_amax_gives_normal_scales(amax: float, power_of_two: bool) -> None:
    scale = delayed_scale(torch.tensor([amax]), ONE, "e5m2", power_of_two=power_of_two)
    assert 2.0**-126 <= scale.item() <= 2.0**126


def test_the_scale_is_read_before_the_new_amax_is_written() -> None:
    history, scale = torch.tensor([1.0, 2.0, 4.0]), torch.tensor(1.0)
    rolled, new = delayed_update(history, scale, torch.tensor(100.0), "e4m3fn")
    assert rolled.tolist() == [100.0, 1.0, 2.0]
    assert 1.0 / new.item() == 64.0  # from 4, which then leaves
    rolled, new = delayed_update(history, scale, torch.tensor(100.0), "e4m3fn", order="history_first")
    assert 1.0 / new.item() == 4.0
    assert history.tolist() == [1.0, 2.0, 4.0], "pure"
    with pytest.raises(FormatError, match="unknown order"):
        delayed_update(history, scale, torch.tensor(1.0), "e4m3fn", order="late")


def test_constant_amax_settles() -> None:
    history, scale = torch.zeros(16), ONE
    for _ in range(20):
        history, scale = delayed_update(history, scale, torch.tensor(3.0), "e4m3fn")
    assert 1.0 / scale.item() == 128.0


def test_traces_without_a_host_read() -> None:
    update = torch.compile(lambda h, s, a: delayed_update(h, s, a, "e5m2"), fullgraph=True, backend="aot_eager")
    args = torch.tensor([1e5, 1.0]), ONE, torch.tensor(2.0)
    for got, expected in zip(update(*args), delayed_update(*args, "e5m2"), strict=True):
        assert torch.equal(got, expected)
