"""20 steps are 10 steps, a checkpoint, a new process and 10 steps, bit for bit, under every shipped recipe; also within a step."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint.runs import HALF, MICROBATCHES, WHOLE, Run, read, same

import fp8fx

CASES = {f"{recipe} at a step": (recipe, HALF * MICROBATCHES) for recipe in fp8fx.Recipe.shipped()}
CASES |= {f"{recipe} within a step": (recipe, HALF * MICROBATCHES + 1) for recipe in ("delayed", "direct", "emulation-hybrid")}
CASES |= {"delayed in the first step": ("delayed", 1)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors; and the number of threads may decide how sums are ordered."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Each case's uninterrupted end as NAME.whole, and its resumed one, which one new process wrote, as NAME.done."""
    place = tmp_path_factory.mktemp("runs")
    for name, (recipe, stop) in CASES.items():
        run = Run(recipe).until(stop)
        run.save(place / f"{name}.safetensors")
        torch.save(run.until(WHOLE * MICROBATCHES).everything(), place / f"{name}.whole")
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("runs.py")), str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs")
@pytest.mark.parametrize("name", CASES)
def test_a_new_process_goes_on_bit_for_bit(name: str, directory: Path) -> None:
    whole = torch.load(directory / f"{name}.whole", weights_only=True)
    resumed = read(directory / f"{name}.done")
    assert same(resumed, whole) == []
    assert sum(key.startswith("optimizer.state") for key in whole) == 21  # exp_avg, exp_avg_sq and step of 7 parameters


def test_the_cases_test_something(directory: Path) -> None:
    """Training moves what is compared, and stochastic recipes depend on the random stream."""
    whole = torch.load(directory / "direct at a step.whole", weights_only=True)
    fresh = Run("direct").everything()
    assert set(same(fresh, whole)) >= {"model.up.weight", "model.norm.running_mean", "model._fp8fx.stream"}
    assert any(key.startswith("scaler") for key in same(fresh, whole))
    delayed = torch.load(directory / "delayed within a step.whole", weights_only=True)
    assert any(key.endswith("history") for key in delayed)
    run = Run("direct").load(directory / "direct within a step.safetensors")
    assert all(parameter.grad is not None for parameter in run.fast.parameters())
    run.fast.load_state_dict({**run.fast.state_dict(), "_fp8fx.stream": torch.tensor([5, 0, 0])})
    assert "model.up.weight" in same(run.until(WHOLE * MICROBATCHES).everything(), whole)


@pytest.mark.parametrize("recipe", ["delayed", "direct"])
def test_the_example(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["checkpoint.py", recipe])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "checkpoint.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "resumed run ends with the same bits: True" in out
    assert f"another recipe is refused: - the recipe is '{recipe}' there and 'hybrid' here" in out
    assert "not loaded: optimizer" in out
    assert "a flipped bit is refused" in out
