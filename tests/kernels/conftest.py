"""How kernels are tested. One set of tests, two places:

a GPU, marker `gpu`             `pytest tests/kernels -m gpu`: what the kernels write, at real sizes
Triton's interpreter, no GPU    test_interpreter.py runs the same files with TRITON_INTERPRET=1, which must be set before a kernel is
                                defined, hence in a process of its own; tests that take `device` then run on the CPU
the compiler for Hopper, no GPU test_compiles.py: the launchers are called with their launch replaced by a compilation for sm_90
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(int(os.environ.get("FP8FX_TEST_SEED", "0")))


@pytest.fixture
def device() -> str:
    """Where the test's tensors live: a GPU, or the CPU under the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """Launches inside the test compile for Hopper instead of running; the fixture returns the kernels compiled since the last call."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    from fp8fx.kernels import launch
    from fp8fx.kernels.gluon import DESCRIPTORS, SPECIALIZED

    if SPECIALIZED is not None:
        from triton.experimental.gluon._runtime import GluonASTSource

    done: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constexprs, attributes = {}, {}, {}
        for position, parameter in enumerate(self.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                signature[parameter.name], constexprs[(position,)] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
            if aligned and not isinstance(value, DESCRIPTORS) and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = (GluonASTSource if self.is_gluon() else ASTSource)(self, signature, constexprs, attributes)
        done.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(
        launch, "_without_a_gpu", lambda kernel, grid, args, constants, options: kernel[grid](*args, **constants, **options)
    )

    def take() -> list[Any]:
        taken, done[:] = list(done), []
        return taken

    return take
