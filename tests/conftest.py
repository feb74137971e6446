"""Shared by all tests: torchvision beside a CPU build of torch, GPU tests only where there is a GPU, threads."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

LONG = (
    "models/test_timm.py", "models/test_transformers.py", "kernels/test_interpreter.py", "gate/test_gate.py", "kernels/test_compiles.py",
    "trainers/test_transformers.py", "trainers/test_accelerate.py", "test_autocast.py", "numerics/test_rounding.py",
)  # fmt: skip
_keep_alive: list[torch.library.Library] = []  # a Library takes its operators away again when it dies


def _import_torchvision() -> None:
    """torchvision's PyPI build fails at import beside a CPU build of torch (`operator torchvision::nms does not exist`).

    timm and transformers import it, so the two operators it looks up are declared first. No test calls them.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # it is not installed, and nothing that is needs it
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep_alive.append(library)
        importlib.import_module("torchvision")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    # `make test-core` runs with what is there, which may lack pytest-timeout: its setting would then be an unknown one, an error.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "read by pytest-timeout where it is installed")


def pytest_configure(config: pytest.Config) -> None:
    # Tensors here are small, and `make test` runs a process per core: one thread each, Inductor's compilers and child processes included.
    # Also alone: the order of sums, and their last bits with it, depends on the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: read by pytest-timeout where it is installed")
    _import_torchvision()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files that take more than a minute first, so that the processes of `make test` end at about the same time.
    ranks = {path: rank for rank, path in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(LONG)))
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
