"""compute-sanitizer finds no access out of bounds (memcheck) and no race in shared memory (racecheck) in a set of launches.

racecheck is not run on `joins`: in a sum over lanes several threads write one float32 to one place, equal but for the order of their
terms, which the tool reports and nothing depends on (triton-lang/triton#7264).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RUNS = [("memcheck", "casts"), ("memcheck", "joins"), ("memcheck", "products"), ("racecheck", "casts"), ("racecheck", "products")]


@pytest.mark.gpu
@pytest.mark.parametrize(("tool", "group"), RUNS)
def test_clean(tool: str, group: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    script = str(Path(__file__).parent / "sanitize.py")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-P", script, group]
    plain = subprocess.run(command[5:], capture_output=True, text=True, check=False)  # compiles the kernels, without the tool
    assert plain.returncode == 0, plain.stderr[-4000:]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"launched {group}" in done.stdout
