"""The fused update of delayed scaling equals fp8fx.numerics.delayed_update bit for bit, slot by slot."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fp8fx import numerics
from fp8fx.errors import KernelError

pytest.importorskip("triton")
from fp8fx.kernels.delayed import delayed_update

FMAX = {"e4m3fn": 448.0, "e5m2": 57344.0}


def state(length: int) -> tuple[torch.Tensor, ...]:
    """History, scale and amax of slots with ordinary, tiny, huge, zero, infinite and NaN magnitudes."""
    special = torch.tensor([0.0, 1e-45, 1e-39, 2.0**-126, 0.001, 0.5, 1.0, 3.0, 448.0, 449.0, 1e5, 3.4e38, math.inf, math.nan])
    n = 2 * len(special) + 4
    history = torch.rand(n, length) * torch.logspace(-30, 30, n)[:, None]
    history[: len(special), 0] = special
    history[len(special) : 2 * len(special)] = special[:, None]
    amax = torch.cat([special.flip(0), special, torch.rand(4)])
    return history, torch.rand(n) + 0.1, amax


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("order", ["scale_first", "history_first"])
@pytest.mark.parametrize("power_of_two", [True, False, None], ids=["powers", "quotients", "both"])
def test_equals_the_reference(device: str, algorithm: str, order: str, power_of_two: bool | None) -> None:
    for length, margin in itertools.product((1, 2, 1000), (0, 3 if power_of_two else -2)):
        history, scale, amax = state(length)
        names = [("e4m3fn", "e5m2")[i % 2] for i in range(len(amax))]
        fmax = torch.tensor([FMAX[name] for name in names])
        moved = [t.to(device, copy=True) for t in (history, scale, amax)]
        powers = torch.tensor([i % 3 == 0 if power_of_two is None else power_of_two for i in range(len(amax))])
        given = powers.to(device) if power_of_two is None else power_of_two
        delayed_update(moved[0], moved[1], moved[2], fmax.to(device), algorithm, margin, given, order, reset_to=-1.0)
        expected = [
            numerics.delayed_update(h, s, a, name, algorithm, margin, bool(power), order)
            for h, s, a, name, power in zip(history, scale, amax, names, powers, strict=True)
        ]
        for actual, wanted in ((moved[0], torch.stack([e[0] for e in expected])), (moved[1], torch.stack([e[1] for e in expected]))):
            torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        assert bool((moved[2] == -1.0).all())


def test_keeps_amax_and_takes_no_slots(device: str) -> None:
    history, scale, amax, fmax = torch.ones(1, 4, device=device), *(torch.ones(1, device=device) for _ in range(3))
    delayed_update(history, scale, amax, fmax)
    assert float(amax) == 1.0
    delayed_update(history[:0], scale[:0], amax[:0], fmax[:0])


def test_what_was_not_measured_stays(device: str) -> None:
    history, scale, fmax = torch.rand(2, 5, device=device), torch.rand(2, device=device), torch.full((2,), 448.0, device=device)
    before = history.clone(), scale.clone()
    delayed_update(history, scale, torch.tensor([-1.0, 2.0], device=device), fmax, order="history_first")
    assert torch.equal(history[0], before[0][0])
    assert torch.equal(scale[0], before[1][0])
    assert float(history[1, 0]) == 2.0


def test_refusals() -> None:
    ones = torch.ones(2)
    with pytest.raises(KernelError, match="algorithm"):
        delayed_update(torch.ones(2, 4), ones, ones, ones, algorithm="mean")
    with pytest.raises(KernelError, match="contiguous"):
        delayed_update(torch.ones(4, 2).t(), ones, ones, ones)
