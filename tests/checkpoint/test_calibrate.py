"""IPEX's flow: calibrate, save, load in a new process, run in evaluation with scales that stand still."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from checkpoint.calibrated import batch, evaluate, make
from checkpoint.runs import same
from safetensors.torch import load_file

import fp8fx


def test_calibrate_save_load_in_a_new_process_run(tmp_path: Path) -> None:
    fast = fp8fx.compile(make(0).eval(), "delayed")
    with torch.no_grad(), fp8fx.autocast(enabled=False, calibrating=True):
        for seed in range(3):
            fast(batch(seed))
    fp8fx.save(fast, tmp_path / "calibrated.safetensors")
    before = {key: value.clone() for key, value in fp8fx.state_dict(fast).items()}
    assert all(value != 1 for key, value in before.items() if key.endswith(("input.scale", "weight.scale")))
    script = str(Path(__file__).with_name("calibrated.py"))
    command = [sys.executable, "-P", script, str(tmp_path / "calibrated.safetensors"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # no warning either
    theirs = load_file(tmp_path / "out")
    assert same(evaluate(fast), theirs) == []
    frozen = {key: value for key, value in theirs.items() if key.startswith("_fp8fx.") and key != "_fp8fx.stream"}
    assert same({key: before[key] for key in before if key != "_fp8fx.stream"}, frozen) == []
    reference = fp8fx.unwrap(fast)(batch(0))
    assert 0 < (theirs["y0"] - reference).norm() < 0.1 * reference.norm()
