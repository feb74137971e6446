"""An operator whose kernel does not compile runs its reference, with one warning, and goes on; other errors are not hidden.

Nor does a Triton that is broken, or a GPU without FP8, stop anything: what would be emulated there stays in high precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

import fp8fx
from fp8fx import FP8Warning, KernelError, pipeline
from fp8fx.clone import runtime_of
from fp8fx.compile import _compiled
from fp8fx.kernels import launch
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.ops import available
from fp8fx.ops.available import no_kernels, triton_works
from fp8fx.ops.cuda import guarded
from fp8fx.ops.library import REFERENCES
from fp8fx.options import Options

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


class Breaks:
    """An import hook: the kernels raise `error` when they are imported."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "fp8fx.ops.cuda":
            raise self.error


@pytest.fixture
def asked_anew() -> Iterator[None]:
    available._broken.cache_clear()
    yield
    available._broken.cache_clear()


def on_gpu(recipe: Any, **gpu: Any) -> tuple[list[str], list[str]]:
    """Modes and reasons of two layers large enough for FP8, as a GPU's graph has them, and the skips of lower."""
    model = torch.nn.Sequential(torch.nn.Linear(8192, 8192, device="meta"), torch.nn.ReLU(), torch.nn.Linear(8192, 8192, device="meta"))
    fast = _compiled(model.bfloat16(), fp8fx.Recipe.load(recipe), Options(plan_only=True, dynamic=False))
    fast(torch.empty(8192, 8192, device="meta", dtype=torch.bfloat16))
    (record,) = runtime_of(fast).graphs
    context = dataclasses.replace(record.context, device="cuda", **gpu)
    compiled = pipeline.run(record.captured, context)
    decisions = [site.decision for site in compiled.annotated]
    return [f"{made.mode}: {made.reason}" for made in decisions], [skip.reason for skip in compiled.skips if skip.rule == "kernels"]


EMULATE = {"extends": "hybrid", "defaults": {"when_not_faster": "emulate"}}


@pytest.mark.parametrize("error", [ImportError("no libtriton"), RuntimeError("0 active drivers\nmore"), AttributeError("jit")], ids=repr)
def test_a_triton_that_does_not_import_is_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch, asked_anew: None) -> None:
    monkeypatch.delitem(sys.modules, "fp8fx.ops.cuda")
    monkeypatch.setattr(sys, "meta_path", [Breaks(error), *sys.meta_path])
    reason = f"Triton is installed and cannot be imported ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    with pytest.warns(FP8Warning) as seen:
        decisions, _ = on_gpu("hybrid")
    assert len(seen) == 1
    assert reason in str(seen[0].message)
    assert not triton_works()
    assert decisions == [f"high_precision: {reason}, and emulating FP8 is slower (when_not_faster: emulate keeps FP8)"] * 2
    decisions, skips = on_gpu(EMULATE)
    assert all(made.startswith("fp8") for made in decisions)
    assert skips == [f"{reason}: the reference runs"]


def test_a_gpu_without_fp8_is_asked_by_its_own_capability() -> None:
    old = {"device_name": "NVIDIA A100", "capability": (8, 0)}
    reason = "NVIDIA A100 has no FP8 matrix instructions (compute capability 8.9 or later)"
    assert no_kernels(**old) == reason
    decisions, _ = on_gpu("hybrid", **old)
    assert decisions == [f"high_precision: {reason}, and emulating FP8 is slower (when_not_faster: emulate keeps FP8)"] * 2
    assert on_gpu(EMULATE, **old)[1] == [f"{reason}: the reference runs"]
    for new in ({}, {"device_name": "NVIDIA H100 80GB HBM3", "capability": (9, 0)}, {"device_name": "NVIDIA L4", "capability": (8, 9)}):
        assert no_kernels(**new) == ""
        decisions, skips = on_gpu("hybrid", **new)
        assert all(made.startswith("fp8") for made in decisions)
        assert skips == []


class OnGPU(torch.Tensor):
    """A CPU tensor that says it lies on the device with this index; -1 is the CPU."""

    index = 0

    def get_device(self) -> int:
        return self.index


def lying(index: int) -> torch.Tensor:
    made = torch.zeros(16, 16).as_subclass(OnGPU)
    made.index = index
    return made


class Kernel:
    """Stands for a kernel that Triton launches, and for what it compiles to."""

    __name__, function, packed_metadata = "a_kernel", None, None
    arg_names, params = ("a", "b", "c"), [SimpleNamespace(do_not_specialize=False, do_not_specialize_on_alignment=False)] * 3

    def __init__(self, run: Any) -> None:
        self.run, self.launches = run, 0

    def __getitem__(self, grid: Any) -> Any:
        def launched(*args: Any, **kwargs: Any) -> Kernel:
            self.launches += 1
            return self

        return launched


@pytest.mark.parametrize("places", [(-1, 0, 0), (0, -1, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("described", [False, True])
def test_tensors_on_several_devices(places: tuple[int, ...], described: bool) -> None:
    """Wherever the stray one stands, and if it is only in a descriptor. Nothing is remembered of the call."""
    args = [lying(index) for index in places]
    if described:
        args = [TensorDescriptor(args[0], [16, 16], [16, 1], [16, 16]), TensorDescriptor(args[1], [16, 16], [16, 1], [16, 16]), args[2]]
    kernel = Kernel(None)
    with pytest.raises(KernelError, match=r"a_kernel: its tensors are on .* Move the model and its inputs to one device"):
        launch.launch(kernel, (1,), tuple(args), {})
    assert kernel.launches == 0


def known(gridX: int, gridY: int, gridZ: int, stream: int, function: Any, *args: Any) -> None:
    RUN.append(args)


def other(grid: tuple[int, ...], stream: int, arguments: Any) -> None:
    raise AssertionError("not the call that it takes")


RUN: list[Any] = []


@pytest.mark.parametrize("run", [known, other])
def test_a_triton_that_launches_otherwise_launches_by_itself(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for name in ("_COMPILED", "_SPECIALIZED", "_FAILED"):
        monkeypatch.setattr(launch, name, {})
    launch._warn_of_another_triton.cache_clear()
    RUN.clear()
    kernel, args = Kernel(run), tuple(lying(0) for _ in range(3))
    expected = pytest.warns(FP8Warning, match="its own launch is used") if run is other else contextlib.nullcontext()
    with expected, launch.recorded() as launches:
        for _ in range(3):
            launch.launch(kernel, (1,), args, {})
    assert kernel.launches == (3 if run is other else 1)
    assert len(launches) == (0 if run is other else 3), "a tape would call it otherwise"
    assert len(RUN) == (0 if run is other else 2)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert no_kernels() == "Triton is not installed"
    assert not triton_works()
