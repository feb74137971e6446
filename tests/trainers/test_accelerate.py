"""accelerate: a compiled model as a plain one, and through accelerate's hooks: of checkpoints, of modules, of its own autocast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers.runs import differences, example

import fp8fx
from fp8fx.demo.models import GPT
from fp8fx.trainers.accelerate import separate_state, use_scaler

run = example("train_with_accelerate")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
def test_stopped_and_resumed(recipe: str, tmp_path: Path) -> None:
    """The state in the model's file, and in one of its own."""
    whole = run.train(recipe, tmp_path / "whole", steps=5)
    for separate in (False, True) if recipe == "delayed" else (False,):
        run.train(recipe, tmp_path / "parts", steps=3, separate=separate)
        saved = load_file(tmp_path / "parts" / "model.safetensors")
        assert any(key.startswith("_fp8fx.") for key in saved) != separate
        assert (tmp_path / "parts" / "scaler.pt").exists() == (recipe == "direct")
        resumed = run.train(recipe, tmp_path / "parts", steps=5, resume=True, separate=separate)
        assert differences(whole, resumed) == []
    plain = GPT(width=32, layers=2, heads=2, context=32)
    plain.load_state_dict(saved if recipe == "delayed" else fp8fx.strip(saved), strict=True)  # an ordinary checkpoint


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run.train("delayed", tmp_path, steps=1)
    before = nn.Module.state_dict
    with pytest.raises(fp8fx.ModelError, match="it holds delayed scales, and recipe 'hybrid' keeps none"):
        run.train("hybrid", tmp_path, steps=2, resume=True)
    assert nn.Module.state_dict is before


class Doubled(ModelHook):
    """A hook of accelerate's: replaces a module's forward on the instance."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


def test_hooks_around_modules() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fast = fp8fx.compile(model, "delayed")
    x = torch.randn(2, 8)
    plain = fast(x)
    state = list(fast.state_dict())
    add_hook_to_module(fast, Doubled())
    assert torch.equal(fast(x), 2 * plain)
    assert list(fast.state_dict()) == state
    with pytest.raises(fp8fx.ModelError, match="compiled by fp8fx already"):
        fp8fx.compile(fast)
    remove_hook_from_module(fast)
    assert torch.equal(fast(x), plain)
    hooked = nn.Linear(8, 8)
    add_hook_to_module(hooked, Doubled())
    with pytest.raises(fp8fx.ModelError, match="remove_hook_from_module"):
        fp8fx.compile(hooked)


def test_mixed_precision(tmp_path: Path) -> None:
    """bf16 puts a forward of accelerate's own on the instance; the FP8 state is saved and loaded through it."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    fast = fp8fx.compile(nn.Linear(8, 4), "delayed")
    model, optimizer = accelerator.prepare(fast, torch.optim.SGD(fast.parameters(), lr=0.1))
    for _ in range(2):
        y = model(torch.randn(2, 8))
        accelerator.backward(y.square().sum())
        optimizer.step()
    assert y.dtype == torch.float32
    saved = {key: value.clone() for key, value in fast.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    accelerator.backward(model(torch.randn(2, 8)).sum())
    optimizer.step()
    model(torch.randn(2, 8))
    accelerator.load_state(str(tmp_path))
    assert differences(fast.state_dict(), saved) == []
    assert accelerator.unwrap_model(model) is fast


def test_accumulated_gradients_are_unscaled_once() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    use_scaler(accelerator, fp8fx.GradScaler("direct", device="cpu"))
    fast = fp8fx.compile(nn.Linear(8, 4), "direct")
    model, optimizer = accelerator.prepare(fast, torch.optim.SGD(fast.parameters(), lr=0.1))
    norms: list[Tensor] = []
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 8)).mean())
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 100.0))
            optimizer.step()
            optimizer.zero_grad()
    assert len(norms) == 2
    assert all(0.1 < norm < 10 for norm in norms)
    assert accelerator.scaler.steps == 2
    with pytest.raises(fp8fx.ModelError, match="has a scaler already"):
        use_scaler(accelerator, fp8fx.GradScaler("direct", device="cpu"))


def test_too_late() -> None:
    accelerator = Accelerator(cpu=True)
    fast = fp8fx.compile(nn.Linear(8, 4), "direct")
    accelerator.prepare(torch.optim.SGD(fast.parameters(), lr=0.1))
    with pytest.raises(fp8fx.ModelError, match=r"before accelerator\.prepare"):
        use_scaler(accelerator, fp8fx.GradScaler("direct", device="cpu"))
    with pytest.raises(fp8fx.ModelError, match=r"the model that fp8fx\.compile returned"):
        separate_state(accelerator, nn.Linear(8, 4))
