"""Nothing moves across a write in place or a change of grad mode: compiled models do what the plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import sqnr
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx


class Case(nn.Module):
    """Two linears, a norm and a cache; `body` says what happens with them."""

    def __init__(self, body: Callable[[Case, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.fc, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("cache", torch.randn(4, 32))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def relu_in_place(m: Case, x: Tensor) -> Tensor:
    y = m.fc(x)
    F.relu(y, inplace=True)
    return m.fc2(y)


def relu_in_place_by_position(m: Case, x: Tensor) -> Tensor:
    y = m.fc(x)
    F.dropout(y, 0.5, False, True)
    F.relu(y, True)
    return m.fc2(y)


def write_a_slice(m: Case, x: Tensor) -> Tensor:
    y = m.fc(x)
    y[..., :16] = 5
    return m.fc2(y)


def write_through_a_view(m: Case, x: Tensor) -> Tensor:
    y = m.fc(x)
    y.view(-1)[:60].mul_(-3)
    return m.fc2(y)


def input_changes_between_two_readers(m: Case, x: Tensor) -> Tensor:
    x = x.clone()
    y = m.fc(x)
    x.neg_()
    return y * 0 + m.fc2(x)


def augmented_assignment(m: Case, x: Tensor) -> Tensor:
    a = x.clone()
    y = m.fc(a)
    a += 3
    return y + m.fc2(a)


def norm_then_write_its_input(m: Case, x: Tensor) -> Tensor:
    x = x * 1
    h = m.norm(x)
    x.mul_(torch.linspace(-3, 3, 32))
    return m.fc(h) + x


def cache_is_written_first(m: Case, x: Tensor) -> Tensor:
    m.cache.copy_(x)
    return x @ m.cache.transpose(-2, -1)


def weight_is_clamped(m: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.fc.weight.clamp_(-0.02, 0.02)
    return m.fc(x)


def bytes_read_as_other_numbers(m: Case, x: Tensor) -> Tensor:
    y = m.fc(x)
    return m.fc2(y.view(torch.int32).view(torch.float32))


CASES = [
    relu_in_place, relu_in_place_by_position, write_a_slice, write_through_a_view, input_changes_between_two_readers,
    augmented_assignment, norm_then_write_its_input, cache_is_written_first, weight_is_clamped, bytes_read_as_other_numbers,
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_writes_in_place_are_seen(body: Any, recipe: str) -> None:
    """To the precision of the formats: a lost write shows as 6 dB or less."""
    torch.manual_seed(0)
    model = Case(body)
    plain, x = Case(body), torch.randn(4, 32)
    plain.load_state_dict(model.state_dict())
    fast = fp8fx.compile(model, recipe)
    for _ in range(2):
        assert sqnr(plain(x).double(), fast(x).double()) > 15
    with torch.no_grad():
        assert sqnr(plain(x).double(), fast(x).double()) > 15


def frozen_norm(m: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.norm(x)
    return m.fc(h)


def frozen_first_layer(m: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = F.gelu(m.fc(x))
    return m.fc2(h)


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize("body", [frozen_norm, frozen_first_layer], ids=lambda body: body.__name__)
def test_what_is_frozen_stays_frozen(body: Any, recipe: str) -> None:
    model = Case(body)
    x = torch.randn(4, 32, requires_grad=True)
    model(x).sum().backward()
    expected = {name for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is None
    model.zero_grad(set_to_none=True)
    fp8fx.compile(model, recipe)(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert x.grad is None


class NamedT(nn.Module):
    """An input called like a tensor method."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, t: Tensor) -> Tensor:
        return F.linear(self.fc(t), self.fc.weight.transpose(dim0=0, dim1=1))


def test_an_input_called_t_and_a_view_by_keywords() -> None:
    model, x = NamedT(), torch.randn(4, 8)
    assert sqnr(model(x).double(), fp8fx.compile(model, "hybrid")(x).double()) > 15


def test_an_activation_called_by_keyword() -> None:
    model = Case(lambda m, x: m.fc2(F.gelu(input=m.fc(x))))
    x = torch.randn(4, 32)
    assert sqnr(model(x).double(), fp8fx.compile(model, "hybrid")(x).double()) > 15
