"""An operator whose kernel does not compile runs its reference, with one warning, and goes on; other errors are not hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fp8fx import FP8Warning, KernelError
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.ops.cuda import guarded
from fp8fx.ops.library import REFERENCES

ARGS = (torch.randn(4, 8), "e4m3fn/current/tensor/nearest_even/saturate", None, "fc", "input", None, "both")


def test_the_reference_runs_with_one_warning() -> None:
    def broken(*args: Any) -> Any:
        raise KernelCompileError("cast_kernel does not compile here: out of resource")

    cast = guarded("cast_current", broken)
    with pytest.warns(FP8Warning, match="fp8fx::cast_current: cast_kernel does not compile here: out of resource"):
        found = cast(*ARGS)
    for ours, theirs in zip(found, REFERENCES["cast_current"](*ARGS), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    cast(*ARGS)  # warnings are errors: a second one would fail


@pytest.mark.parametrize(
    "error", [KernelError("its tensors are on cpu and cuda:0"), torch.OutOfMemoryError("out of memory")], ids=["devices", "memory"]
)
def test_other_errors_pass_through(error: Exception) -> None:
    def broken(*args: Any) -> Any:
        raise error

    with pytest.raises(type(error), match=str(error)):
        guarded("cast_current", broken)(*ARGS)
