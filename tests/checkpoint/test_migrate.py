"""Loading under another recipe, history, format or dtype: refused by default, and by stated rules with migrate=True."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.runs import same
from checkpoint.small import compiled, state, train
from torch import Tensor, nn

import fp8fx
from fp8fx import formats

STEPS = 5


def delayed(history: int = 4, **changes: Any) -> dict[str, Any]:
    roles = {role: {"format": format, "scaling": "delayed"} for role, format in changes.pop("formats", {}).items()}
    scale = {"power_of_two": changes.pop("power_of_two", True)}
    return {"extends": "delayed", "delayed": {"history": history, **changes}, "defaults": roles, "scale": scale}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Five steps of history 4, saved in the middle of the sixth, and the model."""
    fast = compiled(0, delayed())
    optimizer = torch.optim.AdamW(fast.parameters())
    train(fast, optimizer, STEPS)
    fast(torch.ones(2, 8)).sum().backward()
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    return tmp_path / "a.safetensors", fast


def refused(path: Path, fast: nn.Module, message: str, **parts: Any) -> None:
    before = state(fast)
    with pytest.raises(fp8fx.CheckpointError, match=r"(?s)nothing was loaded.*" + message + r".*pass fp8fx\.load\(\.\.\., migrate=True\)"):
        fp8fx.load(path, fast, **parts)
    assert same(state(fast), before) == []


def kept(fast: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("_fp8fx."): value for key, value in fp8fx.state_dict(fast).items()}


def scale_for(amax: float, format: str, margin: int = 0) -> float:
    """The rule for powers of two, by frexp."""
    return 2.0 ** -(math.frexp(formats.get(format).max / amax)[1] - 1 - margin)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("length", [2, 6])
def test_another_history_length(length: int, called: bool, saved: tuple[Path, nn.Module]) -> None:
    """The newest entries stay, in their order; scale and amax of the step so far too."""
    path, fast = saved
    other = compiled(1, delayed(length))
    if called:
        train(other, torch.optim.SGD(other.parameters(), 0.1), 3)
    refused(path, other, f"delayed.history 4 -> {length}.*histories keep their newest entries")
    made = fp8fx.load(path, other, migrate=True)
    assert any("history 4 ->" in line for line in made.migrated)
    ours, theirs = kept(other), kept(fast)
    for key in theirs:
        if key.endswith("history"):
            assert ours[key].tolist() == (theirs[key].tolist() + [0.0] * 9)[:length]
        elif key != "delayed":
            assert torch.equal(ours[key], theirs[key]), key
    train(other, torch.optim.SGD(other.parameters(), 0.1), 1)


@pytest.mark.parametrize("called", [False, True])
def test_another_format(called: bool, saved: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """amax does not depend on the format: the scale of the new one follows from the history."""
    path, fast = saved
    other = compiled(1, delayed(formats={"input": "e5m2"}))
    if called:
        other(torch.ones(2, 8)).sum().backward()
    refused(path, other, r"defaults\.input\.format e4m3fn -> e5m2.*made anew from its history")
    caplog.set_level(logging.INFO, "fp8fx")
    fp8fx.load(path, other, migrate=True)
    other.eval()(torch.ones(2, 8))
    assert "input of '0' was ['e4m3fn', True] in the checkpoint: its scale is made anew for ['e5m2', True]" in caplog.text
    ours, theirs = kept(other), kept(fast)
    for site in ("0", "2"):
        amax = theirs[f"{site}.input.history"].max().item()
        assert ours[f"{site}.input.scale"].item() == scale_for(amax, "e5m2") != theirs[f"{site}.input.scale"].item()
        assert torch.equal(ours[f"{site}.input.history"], theirs[f"{site}.input.history"])
        assert torch.equal(ours[f"{site}.weight.scale"], theirs[f"{site}.weight.scale"])
    fp8fx.save(other, path)  # and is the state of its own recipe from here on
    assert fp8fx.load(path, compiled(2, delayed(formats={"input": "e5m2"}))).migrated == []


def test_a_migrated_state_that_is_saved_before_it_is_used(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Records that no graph has asked for yet are of the earlier format still; they are converted wherever they are asked for."""
    path, fast = saved
    recipe = delayed(formats={"input": "e5m2"})
    other = compiled(1, recipe)
    fp8fx.load(path, other, migrate=True)
    fp8fx.save(other, tmp_path / "b.safetensors")
    direct = compiled(1, recipe)
    assert fp8fx.load(tmp_path / "b.safetensors", direct).migrated == []
    for model in (direct, copy.deepcopy(other), compiled(2, recipe)):
        if not any(key.endswith("scale") for key in kept(model)):
            model.load_state_dict(other.state_dict())
        model.eval()(torch.ones(2, 8))
        assert kept(model)["0.input.scale"].item() == scale_for(kept(fast)["0.input.history"].max().item(), "e5m2")


def test_scales_that_are_no_powers_of_two(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    other = compiled(1, delayed(power_of_two=False))
    refused(path, other, r"scale\.power_of_two True -> False")
    fp8fx.load(path, other, migrate=True)
    other.eval()(torch.ones(2, 8))
    wanted = kept(fast)["0.input.history"].max() / 448.0
    assert kept(other)["0.input.scale"].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_another_margin_and_algorithm(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    other = compiled(1, delayed(margin=2, algorithm="most_recent"))
    refused(path, other, r"delayed\.margin 0 -> 2|delayed\.algorithm max -> most_recent")
    fp8fx.load(path, other, migrate=True)
    ours, theirs = kept(other), kept(fast)
    for key, history in theirs.items():
        if key.endswith("input.history"):
            assert ours[key.replace("history", "scale")].item() == scale_for(history[0].item(), "e4m3fn", margin=2)


def test_delayed_to_current_and_back(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, fast = saved
    hybrid = compiled(1, "hybrid")
    refused(path, hybrid, "has delayed scales and this recipe keeps none.*they are dropped")
    fp8fx.load(path, hybrid, migrate=True)
    assert list(kept(hybrid)) == ["stream"]
    assert torch.equal(kept(hybrid)["stream"], kept(fast)["stream"])
    fp8fx.save(hybrid, tmp_path / "b.safetensors")
    other = compiled(2, delayed())
    train(other, torch.optim.SGD(other.parameters(), 0.1), 2)
    refused(tmp_path / "b.safetensors", other, "has no delayed scales and this recipe keeps them.*start anew.*calibrating=True")
    fp8fx.load(tmp_path / "b.safetensors", other, migrate=True)
    assert all(value == 1 for key, value in kept(other).items() if key.endswith("scale"))
    assert torch.equal(other[0].weight, hybrid[0].weight)
    with pytest.warns(fp8fx.FP8Warning, match="never set"):
        other.eval()(torch.ones(2, 8))


def test_a_layer_that_is_exempt_now(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    other = compiled(1, {**delayed(), "exempt": ["2"]})
    refused(path, other, r"exempt absent -> \['2'\]")
    fp8fx.load(path, other, migrate=True)
    other(torch.ones(2, 8)).sum().backward()
    assert torch.equal(kept(other)["0.input.history"], kept(fast)["0.input.history"])


def test_another_seed_is_meant(saved: tuple[Path, nn.Module]) -> None:
    path, fast = saved
    other = compiled(1, {**delayed(), "seed": 9})
    refused(path, other, "seed 0 -> 9")
    fp8fx.load(path, other, migrate=True)
    assert kept(other)["stream"].tolist() == [9, *kept(fast)["stream"].tolist()[1:]]


@pytest.mark.parametrize(("there", "here", "how"), [(torch.float32, torch.bfloat16, "rounded"), (torch.bfloat16, torch.float32, "exact")])
def test_another_dtype(there: torch.dtype, here: torch.dtype, how: str, tmp_path: Path) -> None:
    """Weights, gradients and the optimizer's moments are cast; its step counts and the FP8 state are not."""
    fast, other = compiled().to(there), compiled(1).to(here)
    optimizer, made = (torch.optim.AdamW(model.parameters()) for model in (fast, other))
    for _ in range(2):
        fast(torch.ones(2, 8, dtype=there)).sum().backward()
        optimizer.step()
    fp8fx.save(fast, tmp_path / "a.safetensors", optimizer=optimizer)
    names = [str(dtype).removeprefix("torch.") for dtype in (there, here)]
    refused(tmp_path / "a.safetensors", other, f"4 of the model's tensors are {names[0]} there and {names[1]} here.*cast \\({how}\\)")
    fp8fx.load(tmp_path / "a.safetensors", other, optimizer=made, migrate=True)
    assert torch.equal(other[0].weight, fast[0].weight.to(here))
    assert torch.equal(other[0].weight.grad, fast[0].weight.grad.to(here))
    mine, theirs = made.state[other[0].weight], optimizer.state[fast[0].weight]
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"].to(here))
    assert (mine["step"].dtype, mine["step"].item()) == (torch.float32, 2.0)
    assert same(kept(other), kept(fast)) == []
    other(torch.ones(2, 8, dtype=here)).sum().backward()
    made.step()


def test_loss_scaling_that_comes_or_goes(tmp_path: Path) -> None:
    fast, path = compiled(0, "direct"), tmp_path / "a.safetensors"
    on, off = fp8fx.GradScaler("direct", device="cpu", init_scale=8.0), fp8fx.GradScaler("hybrid", device="cpu")
    for there, here, message in ((on, off, "enabled there and disabled here.*dropped"), (off, on, "disabled there and enabled here.*anew")):
        fp8fx.save(fast, path, scaler=there)
        before = here.state_dict()
        refused(path, fast, message, scaler=here)
        fp8fx.load(path, fast, scaler=here, migrate=True)
        assert here.state_dict() == before
    fp8fx.save(fast, path, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(fp8fx.CheckpointError, match="other entries in the file: fp8fx_steps"):
        fp8fx.load(path, fast, scaler=on)


def test_what_was_compiled_or_is_now(tmp_path: Path) -> None:
    """The whole model then, a part of it now, and the other way round."""
    path, whole = (
        tmp_path / "a.safetensors",
        fp8fx.compile(nn.ModuleDict({"net": nn.Linear(8, 8)}), "direct", capture="symbolic", on_capture_error="eager"),
    )
    part = nn.ModuleDict({"net": fp8fx.compile(nn.Linear(8, 8), "direct")})
    for there, here, message in (
        (whole, part, "'the whole model' was compiled when this was saved"),
        (part, whole, "'net' was compiled when"),
    ):
        fp8fx.save(there, path)
        refused(path, here, message)
        fp8fx.load(path, here, migrate=True)
        assert torch.equal(here["net"].weight, there["net"].weight)


def test_every_difference_is_listed_at_once(saved: tuple[Path, nn.Module]) -> None:
    path, _ = saved
    other = compiled(1, "hybrid").to(torch.float16)
    with pytest.raises(fp8fx.CheckpointError) as caught:
        fp8fx.load(path, other)
    assert str(caught.value).count("with migrate=True:") == 3  # dtype, recipe, scales


def test_migrate_changes_nothing_where_nothing_differs(saved: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    path, fast = saved
    other = compiled(1, delayed())
    assert fp8fx.load(path, other, migrate=True).migrated == []
    assert same(state(other), state(fast)) == []
    assert caplog.records == []
    fp8fx.load(path, compiled(1, "hybrid"), migrate=True)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
