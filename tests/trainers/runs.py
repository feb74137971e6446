"""Running the examples in this process: the function `train` of one, as a user would import it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module of examples/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or are in one only."""
    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
