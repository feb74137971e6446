"""What the command line works on: the model, data or loss that a target names, and random inputs as --input describes them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8fx.errors import ModelError, nearest


def load_model(target: str) -> nn.Module:
    """The module that TARGET names. Raises ModelError for a target that cannot be found, called, or that gives no module."""
    found = load_object(target)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ModelError(f"target {target!r} is a {type(found).__name__}: a torch.nn.Module, or something that returns one, is needed")
        found = _called(target, found)
    if not isinstance(found, nn.Module):
        raise ModelError(f"target {target!r} gave a {type(found).__name__}, not a torch.nn.Module")
    return found


def load_object(target: str) -> Any:
    """What TARGET names, whatever it is. Raises ModelError for a target that cannot be found."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ModelError(f"target {target!r}: write package.module:name or file.py:name, e.g. torchvision.models:resnet18")
    found: Any = _import(where)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ModelError(f"target {target!r}: {where} has no {part!r}.{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def load_data(target: str) -> Any:
    """The batches that TARGET names: an iterable, or a function without arguments that returns one. Raises ModelError."""
    found = load_object(target)
    return _called(target, found, "the batches") if callable(found) and not isinstance(found, Iterable) else found


def _called(target: str, make: Callable[[], Any], what: str = "the model") -> Any:
    if missing := _required(make):
        raise ModelError(f"target {target!r} needs arguments ({', '.join(missing)}); name a function without any that returns {what}")
    try:
        return make()
    except Exception as error:
        raise ModelError(f"target {target!r} failed when called: {type(error).__name__}: {error}") from error


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not everything callable has a signature
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _import(where: str) -> Any:
    """A module by dotted name, looked for in the current folder too, or by file name."""
    try:
        if where.endswith(".py"):
            return _import_file(Path(where))
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    name = f"fp8fx_target_{path.stem}"  # a name of its own, so that it hides no module that is called like the file
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # a script finds its neighbours
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Given:
    """One --input: `name` is empty for a positional one, `dtype` for the model's own."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Given:
        """`[name=]SHAPE[:dtype]`. Raises ModelError."""
        name, equals, rest = text.rpartition("=")
        shape, _, dtype = rest.partition(":")
        sizes = shape.lower().split("x")
        if not all(size.isdecimal() for size in sizes) or (equals and not name.isidentifier()):
            raise ModelError(f"--input {text!r}: write [name=]SHAPE[:dtype], e.g. 2x3x224x224, 2x16:int64 or mask=2x16:bool")
        return cls(name, tuple(int(size) for size in sizes), dtype)

    def sample(self, dtype: torch.dtype, high: int, generator: torch.Generator) -> torch.Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            kind = dtype if dtype.is_complex else torch.float32
            return torch.randn(self.shape, dtype=kind, generator=generator).to(dtype)
        return torch.randint(0, 2 if dtype is torch.bool else high + 1, self.shape, generator=generator).to(dtype)


def sample_inputs(texts: Iterable[str], model: nn.Module, high: int = 9, seed: int = 0) -> tuple[Any, ...] | dict[str, Any]:
    """Random inputs on the model's device: a tuple, or a dict where any is named. A floating dtype not given is the model's."""
    generator = torch.Generator().manual_seed(seed)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for given in [Given.parse(text) for text in texts]:
        value = given.sample(_dtype(given.dtype) if given.dtype else first.dtype, high, generator).to(first.device)
        if given.name in named:
            raise ModelError(f"--input {given.name} is given twice")
        if given.name:
            named[given.name] = value
        else:
            positional.append(value)
    if not named:
        return tuple(positional)
    signature = inspect.signature(model.forward)
    try:
        bound = dict(signature.bind_partial(*positional, **named).arguments)
    except TypeError as error:
        raise ModelError(f"--input does not fit {type(model).__name__}.forward{signature}: {error}") from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and name in bound:
            raise ModelError(f"--input: {type(model).__name__}.forward{signature} takes *{name}: name none of the inputs")
    return bound


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    known = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")  # of torch's, not int6
    raise ModelError(f"--input: there is no dtype {name!r}; e.g. float32, bfloat16, int64, bool.{nearest(name, known)}")
