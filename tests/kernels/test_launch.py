"""A kernel that does not compile is a KernelError that names it, at once the second time: through `launch`, with Triton's own compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fp8fx.errors import KernelError
from fp8fx.kernels import launch as launching
from fp8fx.kernels.amax import amax
from fp8fx.kernels.cast import cast
from fp8fx.kernels.interpret import INTERPRET
from fp8fx.kernels.launch import KernelCompileError, launch
from fp8fx.kernels.scaled_mm import scaled_mm

pytestmark = pytest.mark.skipif(INTERPRET.value, reason="the interpreter compiles nothing")


@triton.jit
def only_even(x_ptr, n, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(STEP % 2 == 0, "an odd step")
    tl.store(x_ptr + tl.arange(0, STEP), n)


@triton.jit
def _refuses(x):  # type: ignore[no-untyped-def]
    tl.static_assert(x.dtype == tl.float64, "of no use here")
    return x


@triton.jit
def calls(x_ptr, n, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, _refuses(n))


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that Triton was asked to run."""
    names: list[str] = []
    run = triton.runtime.jit.JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", counted)
    return names


def fails_once(x: torch.Tensor, attempts: list[str]) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(KernelCompileError, match=r"^only_even does not compile here") as caught:
            launch(only_even, (1,), (x, 7), {"STEP": 1})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "): an odd step. The reference runs instead" in messages[0]
    assert attempts == ["only_even"]


def test_on_any_machine(compiled: Callable[[], list[Any]], attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensor were on GPU 0, which is compiled for."""
    key = launching._key
    monkeypatch.setattr(launching, "_key", lambda *args: (key(*args)[0], 0))
    monkeypatch.setattr(launching, "_FAILED", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    x = torch.empty(2, dtype=torch.int32)
    fails_once(x, attempts)
    launch(only_even, (1,), (x, 7), {"STEP": 2})
    assert len(compiled()) == 1


def test_the_reason_inside_of_a_function(compiled: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    key = launching._key
    monkeypatch.setattr(launching, "_key", lambda *args: (key(*args)[0], 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    with pytest.raises(KernelCompileError, match=r"^calls does not compile here .*: of no use here\. The reference runs instead"):
        launch(calls, (1,), (torch.empty(2, dtype=torch.int32), 7), {"STEP": 1})


def test_tensors_on_a_cpu() -> None:
    codes = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    for call in (
        lambda: cast(torch.ones(4, 4), "e4m3fn"),
        lambda: amax(torch.ones(4)),
        lambda: scaled_mm(codes, codes.t(), *[torch.ones(())] * 2),
    ):
        with pytest.raises(KernelError, match="its tensors are not on a GPU, and kernels run on CUDA GPUs only"):
            call()


@pytest.mark.gpu
def test_on_a_gpu(attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_FAILED", {})
    x = torch.empty(2, dtype=torch.int32, device="cuda")
    fails_once(x, attempts)
    launch(only_even, (1,), (x, 7), {"STEP": 2})
    assert x.tolist() == [7, 7]
