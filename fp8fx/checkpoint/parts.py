"""What a checkpoint is made of: the model under its wrappers, fp8fx's own state, gradients, and the objects around the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8fx.checkpoint.format import dtype_name
from fp8fx.clone import PREFIX, runtimes_of
from fp8fx.errors import CheckpointError, ModelError
from fp8fx.runtime import Runtime

SAVES = "fp8fx.save(model, path)"
LOADS = "fp8fx.load(model, path)"


@dataclass
class Model:
    """A model and, by the prefix of its name ("" or "encoder."), each of its compiled parts."""

    root: nn.Module
    runtimes: dict[str, Runtime]

    def entries(self) -> dict[str, Any]:
        """The model's own entries and what fp8fx.qat learned, without what is in `state`."""
        return {key: value for key, value in self.root.state_dict().items() if f".{PREFIX}" not in f".{key}"}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """fp8fx's entries, without prefixes, per compiled part."""
        return {prefix: runtime.state() for prefix, runtime in self.runtimes.items()}

    def recipes(self) -> dict[str, Any]:
        return {prefix: {"name": made.recipe.name, "recipe": made.recipe.to_dict()} for prefix, made in self.runtimes.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.root.named_parameters())

    def modules(self, prefix: str) -> set[str]:
        """Names of the modules of one compiled part, seen from it."""
        found = self.root.get_submodule(prefix.removesuffix("."))
        return {name for name, _ in found.named_modules(remove_duplicate=False)}


def model_and_path(usage: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model and the path of a call of `save` or `load`: by position in either order, or named `fast` and `path`.

    Only a model is a Module, so that the order never has to be guessed. Raises TypeError for another number of arguments or another name,
    ModelError where the path is a model.
    """
    if unknown := sorted(named.keys() - {"fast", "path"}):
        raise TypeError(f"{usage}: unexpected keyword argument {unknown[0]!r}")
    if len(given) + len(named) != 2:
        raise TypeError(f"{usage} takes a model and a path, and the rest by keyword; got {len(given) + len(named)} for the two")
    if named:
        other = given[0] if given else None
        fast, path = named.get("fast", other), named.get("path", other)
    else:
        fast, path = reversed(given) if _path_first(*given) else given
    if isinstance(path, nn.Module):
        what = f"two models, {type(fast).__name__} and {type(path).__name__}" if isinstance(fast, nn.Module) else "a model as path"
        raise ModelError(f"{usage}: got {what}; one of the two is the compiled model, the other the path of the file")
    return fast, path


def _path_first(first: Any, second: Any) -> bool:
    """Where neither is a model, by which of the two is a path: the message is about the other then."""
    models, paths = ([isinstance(x, kinds) for x in (first, second)] for kinds in (nn.Module, (str, bytes, os.PathLike)))
    return models == [False, True] or (models == [False, False] and paths == [True, False])


def find(model: Any, usage: str) -> Model:
    """The model inside DistributedDataParallel, DataParallel and torch.compile. Raises ModelError with what is wrong."""
    if isinstance(model, Mapping):
        raise ModelError(f"{usage} takes the compiled model itself, got a {type(model).__name__}; pass the model, not its state_dict")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{usage} takes a compiled model, got a {type(model).__name__}: pass what fp8fx.compile returned")
    root = model
    while isinstance(root, (DistributedDataParallel, DataParallel, torch._dynamo.OptimizedModule)):
        root = root._orig_mod if isinstance(root, torch._dynamo.OptimizedModule) else root.module
    runtimes: dict[str, Runtime] = {}
    for name, module in root.named_modules():
        found = runtimes_of(module) if not isinstance(module, torch._dynamo.OptimizedModule) else []
        if len(found) > 1:
            raise ModelError(
                f"the model{f' {name!r}' if name else ''} was compiled by torch.compile(backend='fp8fx') with {len(found)} recipes or "
                "options, and has a state for each: which is meant cannot be told. Use one, or fp8fx.compile, whose clones each keep one"
            )
        if found:
            runtimes[f"{name}." if name else ""] = found[0]
    if not runtimes:
        raise ModelError(_not_compiled(model, root, usage))
    return Model(root, runtimes)


def _not_compiled(model: nn.Module, root: nn.Module, usage: str) -> str:
    if isinstance(model, torch._dynamo.OptimizedModule) or root._compiled_call_impl is not None:
        return (
            f"{usage}: this model under torch.compile has no state of fp8fx yet. With backend='fp8fx' it has one after a first call: call "
            "it once (model(x)) before. fp8fx.compile(model) needs no call"
        )
    weights = (
        "torch.save(model.state_dict(), path)"
        if usage == SAVES
        else "model.load_state_dict(fp8fx.strip(safetensors.torch.load_file(path)))"
    )
    return (
        f"{usage}: this {type(root).__name__} is not compiled by fp8fx, nor is a part of it. Pass what fp8fx.compile returned (the "
        f"original and the clone share their parameters); for a plain model: {weights}"
    )


def gradients(model: Model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.parameters().items() if parameter.grad is not None}


# -- the objects around it ------------------------------------------------------------------------------------------------


def listed(given: Any, kind: str, usage: str) -> list[Any]:
    """One object or several, each with state_dict and load_state_dict. kind: the name of the argument."""
    found = [] if given is None else list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for entry in found:
        if isinstance(entry, Mapping):
            raise CheckpointError(f"{usage}: {kind} is a {type(entry).__name__}; pass the {kind} itself, fp8fx takes its state_dict")
        wanted = ("state_dict", "load_state_dict") + (("param_groups",) if kind == "optimizer" else ())
        if lacking := [name for name in wanted if not hasattr(entry, name)]:
            raise CheckpointError(f"{usage}: {kind} is a {type(entry).__name__}, which has no {lacking[0]}")
    return [unwrapped(entry) for entry in found] if kind == "optimizer" else found


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which is an Optimizer too."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def class_name(value: Any) -> str:
    return type(value).__qualname__


def optimizer_part(optimizer: Any, model: Model, usage: str) -> dict[str, Any]:
    """Its state_dict, its class, and which parameter each of its numbers means: [name or None, shape] per group; and their dtypes."""
    dtypes = [[dtype_name(parameter.dtype) for parameter in group["params"]] for group in optimizer.param_groups]
    groups = optimizer_groups(optimizer, model, usage)
    return {"class": class_name(optimizer), "groups": groups, "dtypes": dtypes, "state": optimizer.state_dict()}


def optimizer_groups(optimizer: Any, model: Model, usage: str) -> list[list[list[Any]]]:
    names = {id(parameter): name for name, parameter in model.parameters().items()}
    groups = [[[names.get(id(p)), list(p.shape)] for p in group["params"]] for group in optimizer.param_groups]
    if all(name is None for group in groups for name, _ in group):
        raise CheckpointError(
            f"{usage}: this {class_name(optimizer)} holds none of the model's parameters. It was made for another model (or before "
            "parameters were replaced): make it from the model that is passed here"
        )
    return groups
