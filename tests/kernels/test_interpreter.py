"""The tests of this folder that take `device`, in Triton's interpreter: a process of its own, since Triton reads the variable early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return  # this is that process
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # numpy warns where it casts NaN, inf and out-of-range numbers, which the kernels do on purpose.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "--ignore", str(here / "test_compiles.py")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, str(here)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
