"""Copies of a compiled model, and its state_dict."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_net import Net, is_fp8, make, rows
from torch import Tensor, nn

import fp8fx
from fp8fx.clone import runtime_of

# -- copies ---------------------------------------------------------------------------------------------------------------


def by_pickle(fast: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(fast))  # type: ignore[no-any-return]


def by_torch_save(fast: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, copy.copy, by_pickle, by_torch_save])
def test_copies_stay_fp8(copied_by: Callable[[nn.Module], nn.Module], called: bool) -> None:
    fast = fp8fx.compile(make(), exempt=["head"])
    if called:
        fast(rows())
    copied = copied_by(fast)
    assert isinstance(copied, Net)
    assert torch.equal(copied(rows()), fast(rows()))
    assert is_fp8(copied)
    assert fp8fx.plan(copied)["head"].decision == "exempt"
    plain = fp8fx.unwrap(copied)
    assert type(plain) is Net
    if copied_by is not copy.copy:
        assert copied.fc1.weight is not fast.fc1.weight
        assert plain.fc1.weight is copied.fc1.weight


class Locked(nn.Linear):
    """Copyable because it says how."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle])
def test_copies_follow_the_model_s_own_getstate(copied_by: Callable[[nn.Module], nn.Module]) -> None:
    fast = fp8fx.compile(Locked())
    copied = copied_by(fast)
    assert torch.equal(copied(rows()), fast(rows()))
    assert copied.lock is not fast.lock


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
def test_a_compiled_model_is_freed(capture: str) -> None:
    """Dynamo's caches outlive it, and hold neither the model nor the clone."""
    model = make()
    fast = fp8fx.compile(model, capture=capture)
    fast(rows()).sum().backward()
    alive = [weakref.ref(model), weakref.ref(fast), weakref.ref(runtime_of(fast))]
    del model, fast
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


# -- state_dict -----------------------------------------------------------------------------------------------------------


def test_state_dict_is_the_original_s_plus_one_prefix() -> None:
    model = make()
    fast = fp8fx.compile(model, "direct")
    saved, ours = fast.state_dict(), fp8fx.state_dict(fast)
    assert list(fp8fx.strip(saved)) == list(model.state_dict())
    assert set(saved) - set(model.state_dict()) == set(ours)
    assert all(key.startswith("_fp8fx.") and type(value) is Tensor for key, value in ours.items())
    model.load_state_dict(fp8fx.strip(saved), strict=True)


def test_original_checkpoint_loads_strictly() -> None:
    model, other = make(), make(1)
    fast = fp8fx.compile(model)
    result = fast.load_state_dict(other.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(fast(rows()), fp8fx.compile(other)(rows()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fast.load_state_dict({**other.state_dict(), "nonsense": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})


def test_checkpoint_resumes_bit_for_bit_with_weights_only(tmp_path: Path) -> None:
    """Stochastic rounding goes on where it stopped, from a checkpoint as from a copy."""

    def step(fast: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        (fast(rows(seed=seed)).square().mean() * 1024).backward()
        optimizer.step()

    first = fp8fx.compile(make(), "direct")
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-4)
    for seed in range(3):
        step(first, optimizer, seed)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second = fp8fx.compile(make(5), "direct")
    second.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    third = copy.deepcopy(first)
    others = [(fast, torch.optim.SGD(fast.parameters(), lr=1e-4)) for fast in (second, third)]
    for fast, made in (first, optimizer), *others:
        step(fast, made, 3)
        step(fast, made, 4)
    for (name, ours), *theirs in zip(first.named_parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(ours, theirs[0]), name
        assert torch.equal(ours, theirs[1]), name


def test_a_compiled_model_inside_another_module_saves_and_loads() -> None:
    outer = nn.ModuleDict({"net": fp8fx.compile(make(), "direct"), "other": nn.Linear(2, 2)})
    saved = outer.state_dict()
    assert any(key.startswith("net._fp8fx.") for key in saved)
    outer.load_state_dict(saved, strict=True)
