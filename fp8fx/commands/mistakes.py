"""What the command line makes of mistakes: a forward that fails, a package that is missing, a file where a folder is wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8fx.errors import CaptureError, FP8Error, ModelError

Given = tuple[Any, ...] | dict[str, Any]
# Packages that models come from. For other names no `pip install` is proposed: a mistyped one may be anybody's package.
_PACKAGES = ("torchvision", "torchaudio", "timm", "transformers", "diffusers", "peft", "accelerate", "lightning")


@contextlib.contextmanager
def running(model: nn.Module, given: Given | None) -> Iterator[None]:
    """Around what runs `model` on `given`: ModelError where the model itself fails on it. Anything else that fails is not the model's."""
    try:
        yield
    except Exception as error:
        if given is None or (isinstance(error, FP8Error) and not isinstance(error, CaptureError)):
            raise
        own = _failure(model, given)
        if own is None:
            raise
        text = f"{type(model).__name__}.forward fails on the inputs {_described(given)}: {type(own).__name__}: {own}"
        raise ModelError(text) from own


def _failure(model: nn.Module, given: Given) -> Exception | None:
    try:
        with torch.no_grad():
            model(**given) if isinstance(given, dict) else model(*given)
    except Exception as error:
        return error
    return None


def _described(given: Given) -> str:
    """`int64 [2, 8] of 0 to 99, mask=bool [2, 8]`."""
    if isinstance(given, dict):
        return ", ".join(f"{name}={_one(value)}" for name, value in given.items())
    return ", ".join(map(_one, given))


def _one(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.is_floating_point() or value.is_complex() or value.dtype is torch.bool or not value.numel():
        return text
    return f"{text} of {value.min()} to {value.max()}"


def advice(error: FP8Error) -> str:
    """What to do where `error` comes from a package that is missing, or built for another torch; or an empty string."""
    cause = error.__cause__
    if not isinstance(error, ModelError) or cause is None:
        return ""
    if "operator torchvision::" in str(cause):
        index = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
        return (
            f"\nThe installed torchvision is built for another build of torch than {torch.__version__}. Install both from one index, e.g.\n"
            f"    pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/{index}"
        )
    if not isinstance(cause, ModuleNotFoundError) or not cause.name or "." in cause.name:
        return ""
    if cause.name in _PACKAGES:
        return f"\nThe package {cause.name} is not installed: pip install {cause.name}"
    return f"\nNo package {cause.name!r} is installed, and {cause.name}.py is not in this folder either"


def check_folder(option: str, path: Path) -> None:
    """FP8Error where no folder can be at `path`."""
    file = next((part for part in (path, *path.parents) if part.exists()), path)
    if file.exists() and not file.is_dir():
        raise FP8Error(f"{option} {path}: {file} is a file; a folder is wanted, for several files")
