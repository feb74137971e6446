"""The contract of `fp8fx.compile`: what the returned object is, keeps, and does."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from compiled_net import Net, make, rows
from torch import nn

import fp8fx
from fp8fx.clone import runtime_of

# -- a structural clone ---------------------------------------------------------------------------------------------------


def test_same_parameters_and_buffers_under_the_same_names() -> None:
    model = make()
    fast = fp8fx.compile(model)
    assert [(n, id(p)) for n, p in fast.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in fast.named_buffers()] == [(n, id(b)) for n, b in model.named_buffers()]
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert fast.fc1 is not model.fc1


def test_class_signature_and_attributes() -> None:
    model = make()
    model.custom = "kept"  # type: ignore[assignment]
    fast = fp8fx.compile(model)
    assert isinstance(fast, Net)
    assert type(fast) is not Net
    assert type(fast).__name__ == type(fast).__qualname__ == "Net"
    assert type(fast).__module__ == Net.__module__
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.forward.__doc__ == "The documented forward."
    assert fast.config == {"width": 16}
    assert fast.custom == "kept"
    assert repr(fast) == repr(model)
    assert type(fp8fx.compile(make(1))) is type(fast)


def test_flags_and_modes_are_separate() -> None:
    model = make()
    model.fc2.eval()
    model.head.weight.requires_grad_(False)
    fast = fp8fx.compile(model)
    assert fast.training
    assert not fast.fc2.training
    assert not fast.head.weight.requires_grad
    fast.eval()
    assert model.training
    fast.train()
    assert not model.fc2.training


def test_hooks_come_along() -> None:
    model, seen = make(), []
    model.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    model.fc2.register_forward_hook(lambda m, args, out: out * 0)
    fast = fp8fx.compile(model)
    fast(rows())
    assert seen == ["Net"]
    model.fc2._forward_hooks.clear()
    assert torch.equal(fast(rows()), fp8fx.compile(model)(rows())) is False  # the clone keeps its own


def test_out_of_place() -> None:
    model, x = make(), rows()
    expected = model(x)
    fast = fp8fx.compile(model)
    fast(x).sum().backward()
    fast.extra = 1  # type: ignore[assignment]
    assert torch.equal(model(x), expected)
    assert not hasattr(model, "extra")
    assert not torch.equal(fast(x), expected)
    assert fp8fx.unwrap(fast) is model


def test_methods_run_the_compiled_forward() -> None:
    fast = fp8fx.compile(make())
    assert torch.equal(fast.predict(rows()), fast(rows()).argmax(-1))
    assert fast.plan().summary.startswith("3 of 3 layers")  # type: ignore[operator]


def test_one_optimizer_serves_both() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fast = fp8fx.compile(model)
    before, x = model(rows()).detach(), rows()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fast(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model(x), before)


def test_arguments_by_position_and_by_name() -> None:
    fast, model = fp8fx.compile(make(), "none"), make()
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert torch.equal(fast(rows(), mask, scale=2.0), model(rows(), mask, scale=2.0))
    assert torch.equal(fast(mask=mask, x=rows()), model(rows(), mask))


def test_models_that_use_our_names_keep_theirs() -> None:
    class Planner(nn.Linear):
        def plan(self) -> str:
            return "mine"

    fast = fp8fx.compile(Planner(8, 4))
    fast(rows())
    assert fast.plan() == "mine"
    assert len(fp8fx.plan(fast).fp8) == 1


def test_unwrap_of_others() -> None:
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.unwrap(make())
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.invalidate(make())


# -- dtypes and autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_output_and_quantize_reads_what_was_there_before(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    x = torch.randn(16, 64, requires_grad=True)
    fast = fp8fx.compile(model)
    full = fast(x)
    with torch.autocast("cpu", dtype):
        y = fast(x)
        ordinary = model(x)
    assert y.dtype is ordinary.dtype is dtype
    assert torch.equal(y, full.to(dtype))  # the same codes, accumulated in fp32, cast once
    assert not torch.equal(y, fp8fx.compile(copy.deepcopy(model).to(dtype))(x.to(dtype)))  # codes of a cast tensor differ
    y.float().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype is x.grad.dtype is torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_training_in_other_dtypes(dtype: torch.dtype) -> None:
    fast = fp8fx.compile(make().to(dtype))
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fast(rows().to(dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- the runtime ----------------------------------------------------------------------------------------------------------


def test_runtime_is_one_attribute() -> None:
    fast = fp8fx.compile(make())
    assert runtime_of(fast) is vars(fast)["_fp8fx_runtime"]
    assert "_fp8fx_runtime" not in vars(fp8fx.unwrap(fast))


def test_more_models_of_one_class_than_dynamo_keeps_entries_for() -> None:
    """Dynamo keeps at most 256 entries per code object, for all models of a class together; a model has a copy of its own."""
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=4):
        for _ in range(8):
            fast = fp8fx.compile(nn.Sequential(nn.Linear(4, 4)), "hybrid", fullgraph=True)
            fast(torch.randn(2, 4))
            assert fast.plan().fp8
