"""torch.distributed.checkpoint with one process and with two (gloo)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint.distributed import everything, make, run, step, trained
from checkpoint.runs import same
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fp8fx

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage", "ignore::FutureWarning:torch.*")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes trained, saved, loaded into fresh models, loaded with another history, and went on each time."""
    place = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).with_name("distributed.py"))
    command = [sys.executable, "-P", script, "save,load,load migrated"]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(place)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return place


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_go_on_bit_for_bit(rank: int, two: Path) -> None:
    """Also with what each rank measured in the step so far, which is another for each."""
    for when in ("", " after"):
        assert same(load_file(two / f"load {rank}{when}"), load_file(two / f"save {rank}{when}")) == []
    amax = [load_file(two / f"load {rank}")["_fp8fx.0.input.amax"].item() for rank in (0, 1)]
    assert amax[1] == 2 * amax[0] > 0


def test_two_processes_migrate(two: Path) -> None:
    saved, loaded = load_file(two / "save 0"), load_file(two / "load migrated 0")
    assert torch.equal(loaded["_fp8fx.0.input.history"], saved["_fp8fx.0.input.history"][:4])
    assert torch.equal(loaded["0.weight"], saved["0.weight"])
    assert torch.equal(loaded["optimizer.0.exp_avg"], saved["optimizer.0.exp_avg"])


def test_one_process(tmp_path: Path) -> None:
    for what in ("save", "load", "load migrated"):
        run(what, 0, tmp_path)
    for when in ("", " after"):
        assert same(load_file(tmp_path / f"load 0{when}"), load_file(tmp_path / f"save 0{when}")) == []


def test_two_processes_checkpoint_loads_into_one(two: Path) -> None:
    """The amax of the step so far is the largest that any rank saw."""
    fast = make(3)
    optimizer = torch.optim.AdamW(fast.parameters())
    dcp.load({"run": fp8fx.DistributedState(fast, optimizer, fp8fx.GradScaler("direct", device="cpu"))}, checkpoint_id=str(two / "dcp"))
    ours, first, second = everything(fast, optimizer), load_file(two / "save 0"), load_file(two / "save 1")
    differing = same(ours, first)
    assert differing
    assert all(key.endswith(".amax") for key in differing)
    for key in ours:
        if key.endswith(".amax"):
            assert torch.equal(ours[key], torch.maximum(first[key], second[key]))


def test_another_recipe_is_refused(two: Path) -> None:
    fast = make(3, "hybrid")
    state = fp8fx.DistributedState(fast)
    with pytest.raises(Exception, match=r"(?s)was saved under another setup.*DistributedState\(\.\.\., migrate=True\)"):
        dcp.load({"run": state}, checkpoint_id=str(two / "dcp"))


def test_saving_is_not_a_step(tmp_path: Path) -> None:
    """torch steps a fresh optimizer once to see what it keeps; no step of the random stream and of the scales ends by that."""
    fast = make(0)
    optimizer = torch.optim.AdamW(fast.parameters())
    fast(torch.ones(2, 8)).sum().backward()
    optimizer.zero_grad()
    before = {key: value.clone() for key, value in fp8fx.state_dict(fast).items()}
    dcp.save({"run": fp8fx.DistributedState(fast, optimizer)}, checkpoint_id=str(tmp_path / "dcp"))
    assert same(fp8fx.state_dict(fast), before) == []
    step(fast, optimizer, 1)
    assert same(fp8fx.state_dict(fast), before) != []


def test_torch_s_own_functions_take_a_compiled_model(tmp_path: Path) -> None:
    """get_state_dict and set_state_dict follow names through the model, fp8fx's too; a model that ran has the same entries."""
    fast, optimizer, _ = trained(0)
    model_state, optimizer_state = get_state_dict(fast, optimizer)
    assert set(model_state) == set(fast.state_dict())
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(tmp_path / "dcp"))
    other, made, _ = trained(1)
    with torch.no_grad():
        other[0].weight.zero_()
    states = dict(zip(("model", "optimizer"), get_state_dict(other, made), strict=True))
    dcp.load(states, checkpoint_id=str(tmp_path / "dcp"))
    set_state_dict(other, made, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    assert same(everything(other, made), everything(fast, optimizer)) == []


def test_wrong_uses() -> None:
    fast = make(0)
    optimizer = torch.optim.AdamW(fast.parameters())
    with pytest.raises(fp8fx.CheckpointError, match="takes one optimizer and one scaler"):
        fp8fx.DistributedState(fast, [optimizer, optimizer])
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.DistributedState(fp8fx.unwrap(fast), optimizer)
