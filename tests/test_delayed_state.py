"""Delayed scaling: the state in copies and checkpoints, and what of it is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from delayed_net import EVERY_ROLE, assert_equal_state, batch, by_backend, loss_of, net, scales, train
from torch import Tensor, nn

import fp8fx


def test_the_models_own_entries_come_first_and_keep_their_place() -> None:
    """An average of weights that pairs the values of two state_dicts by position, one of them older, finds the weights."""
    fast = fp8fx.compile(net(), "delayed")
    before = list(fast.state_dict())
    train(fast, 2)
    after = list(fast.state_dict())
    own = [key for key in after if not key.startswith("_fp8fx.")]
    assert after[: len(own)] == own == [key for key in before if not key.startswith("_fp8fx.")]
    shapes = {key: value.shape for key, value in fp8fx.state_dict(fast).items()}
    fast(batch(1))  # a step begins
    assert {key: value.shape for key, value in fp8fx.state_dict(fast).items()} == shapes


def test_a_compiled_model_inside_another() -> None:
    outer = nn.Sequential(nn.Linear(8, 8), fp8fx.compile(nn.Linear(8, 8), "delayed"))
    outer(torch.ones(2, 8)).sum().backward()
    state = outer.state_dict()
    assert list(fp8fx.strip(state)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert fp8fx.state_dict(outer).keys() == state.keys() - fp8fx.strip(state).keys()


def test_the_state_of_the_bare_backend_can_be_saved() -> None:
    first, runtime = by_backend(net(), "delayed", "eager")
    for seed in range(2):
        loss_of(first, batch(seed)).backward()
    fp8fx.step(first)
    loss_of(first, batch(3))
    state = fp8fx.state_dict(first)
    second, other = by_backend(net(), "delayed", "eager")
    with pytest.raises(fp8fx.ModelError, match="call a model under"):
        fp8fx.load_state_dict(second, state)
    loss_of(second, batch(9))
    fp8fx.load_state_dict(second, state)
    assert torch.equal(runtime().scaling.scale, other().scaling.scale)


def test_damaged_state() -> None:
    fast = fp8fx.compile(net(), "delayed")
    train(fast, 1)
    for damaged in (torch.rand(5), torch.tensor([1, 2], dtype=torch.uint8)):
        with pytest.raises(fp8fx.ModelError, match="'delayed' of the state is damaged"):
            fast.load_state_dict({**fast.state_dict(), "_fp8fx.delayed": damaged})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_state_and_goes_on_the_same(how: Any) -> None:
    fast = fp8fx.compile(net(), EVERY_ROLE)
    train(fast, 3)
    copied = how(fast)
    before = {key: value.clone() for key, value in scales(fast).items()}
    train(copied, 2, seed=1)
    assert all(torch.equal(before[key], value) for key, value in scales(fast).items())
    train(fast, 2, seed=1)
    for mine, other in zip(fast.parameters(), copied.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert_equal_state(fast, copied)


@pytest.mark.parametrize("microbatch", [0, 1])
def test_a_checkpoint_goes_on_bit_for_bit(microbatch: int) -> None:
    """Also from the middle of gradient accumulation, and from between an optimizer step and the next forward."""
    fast = fp8fx.compile(net(), EVERY_ROLE)
    optimizer = train(fast, 3)
    for seed in range(microbatch):
        loss_of(fast, batch(50 + seed)).backward()
    other = fp8fx.compile(net(), EVERY_ROLE)
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert torch.equal(fast(batch(3)), other(batch(3)))  # evaluation reads the same scales
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    second = torch.optim.SGD(other.parameters(), 0.1)
    for model, opt in ((fast, optimizer), (other, second)):
        loss_of(model, batch(60)).backward()
        opt.step()
        opt.zero_grad()
        loss_of(model, batch(61)).backward()
    for mine, theirs in zip(fast.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    assert_equal_state(fast, other)


def test_state_is_plain_tensors_and_an_original_checkpoint_loads(tmp_path: Any) -> None:
    model = net()
    fast = fp8fx.compile(model, "delayed")
    train(fast, 1)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    state = torch.load(tmp_path / "fast.pt", weights_only=True)
    assert fp8fx.strip(state).keys() == model.state_dict().keys()
    before = scales(fast)
    fast.load_state_dict(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in scales(fast).items())


def foreign(there: Any, here: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, other = net(), net()
    saved = fp8fx.compile(other, there)
    train(saved, 1)
    loading = fp8fx.compile(model, here)
    loading(batch(0))
    return loading, saved.state_dict()


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("delayed", "hybrid", "it holds delayed scales, and recipe 'hybrid' keeps none"),
        ("hybrid", "delayed", "it holds no delayed scales, and recipe 'delayed' keeps them"),
        ({"extends": "delayed", "delayed": {"history": 4}}, "delayed", "delayed.history is 4 there and 16 here"),
        ({"extends": "delayed", "delayed": {"order": "after"}}, "delayed", "delayed.order is 'after' there and 'before' here"),
        (
            {"extends": "delayed", "scale": {"power_of_two": False}}, "delayed",
            "weight of 'embed.embedding' is e4m3fn there and e4m3fn with powers of two here",
        ),
        ({"extends": "delayed", "defaults": {"weight": {"format": "e5m2"}}}, "delayed", "weight of 'embed.embedding' is e5m2 with powers"),
    ],
)  # fmt: skip
def test_a_state_of_another_recipe_is_refused_before_anything_is_loaded(there: Any, here: Any, message: str) -> None:
    loading, state = foreign(there, here)
    before = {key: value.clone() for key, value in loading.state_dict().items()}
    with pytest.raises(fp8fx.ModelError, match="this state is of another recipe: ") as caught:
        loading.load_state_dict(state)
    assert message in str(caught.value)
    assert "fp8fx.strip(state)" in str(caught.value)
    for key, value in loading.state_dict().items():
        assert torch.equal(before[key], value), key
    loading.load_state_dict(fp8fx.strip(state))


def test_a_format_that_no_graph_has_met_yet_is_refused_at_the_first_call() -> None:
    saved = fp8fx.compile(net(), {"extends": "delayed", "defaults": {"weight": {"format": "e5m2"}}})
    train(saved, 1)
    fresh = fp8fx.compile(net(), "delayed")
    fresh.load_state_dict(saved.state_dict())
    with pytest.raises(
        fp8fx.ModelError, match=r"of another recipe: weight of 'embed.embedding' is e5m2 with powers of two there and e4m3fn"
    ):
        fresh(batch(0))
