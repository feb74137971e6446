"""A structural clone: new module instances of the same classes, sharing every tensor, running the compiled forward.

The clone's class is a subclass of the original's, made on the fly, with the same name and the same `forward` signature, so that
`isinstance`, `config`, `generate` and trainers that inspect the signature see what they expect. Copying or pickling the clone
keeps it compiled: the runtime travels along and captures again.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from fp8fx.errors import CaptureError, ModelError, nearest

RUNTIME = "_fp8fx_runtime"  # attribute of a compiled model
BASE = "_fp8fx_base"  # attribute of its class: the class it was made from
PREFIX = "_fp8fx."  # of fp8fx's own entries in a state_dict
QUANTIZERS = "_fp8fx_qat"  # the module of learned formats in what fp8fx.qat makes


def clone(model: nn.Module, share_buffers: bool = True) -> nn.Module:
    """New modules, the same parameters (and buffers) under the same names. The original stays as it was."""
    shared: list[Any] = list(model.parameters())
    shared += list(model.buffers()) if share_buffers else []
    for module in model.modules():
        shared += [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
    memo: dict[int, Any] = {id(value): value for value in shared}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be cloned: {error}. fp8fx.compile works on a copy of the model's structure, so every "
            "attribute of every module must be copyable (copy.deepcopy); hold locks, files and generators outside of the model."
        ) from error


def runtime_of(model: object) -> Any:
    """The Runtime of a compiled model, or None."""
    return vars(model).get(RUNTIME) if isinstance(model, nn.Module) else None


# Models that the bare backend captures in place -> (recipe, options) -> Runtime. Weak: a model that is gone takes its state along.
IN_PLACE: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


def runtimes_of(model: object) -> list[Any]:
    """The Runtime of a compiled model, or those of a model that torch.compile(backend="fp8fx") has captured so far."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    own = runtime_of(model)
    return [own] if own is not None else list(IN_PLACE.get(model, {}).values()) if isinstance(model, nn.Module) else []


class _AnyName:
    """Has every attribute. torch.distributed.checkpoint follows each key of a state_dict from attribute to attribute, also fp8fx's own."""

    def __getattr__(self, name: str) -> _AnyName:
        if name.startswith("__") or name == "_fqn_modifiers":  # torch asks for this one to see whether a module renames its entries
            raise AttributeError(name)
        return self


_ANY_NAME = _AnyName()
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _own_keys(model: nn.Module) -> list[str]:
    """The keys of the model's tensors in a state_dict. Not from its `state_dict`, whose hooks are the user's to be called."""
    keys = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for path, module in model.named_modules(remove_duplicate=False):
        kept = [name for name, buffer in module._buffers.items() if buffer is not None and name not in module._non_persistent_buffers_set]
        keys += [f"{path}.{name}" if path else name for name in kept]
    return keys


def compiled_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose forward is the compiled one; the same one for every model of that class."""
    if base not in _CLASSES:
        _CLASSES[base] = _make_class(base)
    return _CLASSES[base]


def _make_class(base: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():  # it would follow the plain forward, and the program would have no FP8 in it
            raise ModelError("a compiled model cannot be exported (torch.export, torch.onnx): export the original, fp8fx.unwrap(model)")
        return vars(self)[RUNTIME].call(self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return _rebuild, (base,), self.__getstate__()  # type: ignore[operator]

    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """After all other entries: what pairs the values of two state_dicts by position still finds the model's own."""
        destination = base.state_dict(self, *args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name, value in vars(self)[RUNTIME].state().items():
            destination[prefix + PREFIX + name] = value
        return destination

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        runtime, start = vars(self)[RUNTIME], prefix + PREFIX
        whole = all(prefix + key in state_dict for key in _own_keys(self))
        ours = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        modules = dict(self.named_modules(remove_duplicate=False))
        missing, unknown = runtime.unmatched(ours, modules)
        # One of several files may hold all weights and a part of fp8fx's entries, or the other way round.
        state: dict[str, torch.Tensor] | None = ours if whole and not missing else runtime.shards.add(ours, runtime)
        if state is not None:
            _, left_out = runtime.unmatched(state, modules)
            runtime.load_state({key: value for key, value in state.items() if key not in left_out})
        _, _, missing_keys, unexpected_keys, _ = rest
        missing_keys += [start + key for key in missing] if whole else []
        unexpected_keys += [start + key for key in unknown]
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    members: dict[str, Any] = {
        BASE: base,
        "forward": forward,
        "__reduce_ex__": reduce,
        "state_dict": save,
        "_load_from_state_dict": load,
        PREFIX.rstrip("."): _ANY_NAME,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    for name, function in (("plan", _plan), ("graph", _graph)):
        if not hasattr(base, name):  # a model's own method of that name wins; fp8fx.plan(fast) always works
            members[name] = function
    return cast(type[nn.Module], type(base.__name__, (base,), members))


def _plan(self: nn.Module) -> Any:
    """The plan of this compiled model: one row per layer, what it does and why."""
    return vars(self)[RUNTIME].plan()


def _graph(self: nn.Module, stage: str = "lower", index: int = 0) -> Any:
    """The torch.fx.GraphModule after `stage` (capture, annotate, insert_qdq, cancel, fuse, lower) of captured graph `index`."""
    return vars(self)[RUNTIME].stage(stage, index)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = compiled_class(base)
    return cls.__new__(cls)


def base_class(model: nn.Module) -> type[nn.Module]:
    """The class the model had before it was compiled, also where torch has made a subclass of the compiled one since."""
    return getattr(type(model), BASE) if runtime_of(model) is not None else type(model)


def check_model(model: object) -> nn.Module:
    """The model if it can be compiled, else ModelError with the reason."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"fp8fx.compile takes a torch.nn.Module, got {type(model).__name__}")
    if runtime_of(model) is not None:
        raise ModelError("this model is compiled by fp8fx already; compile the original (fp8fx.unwrap(model)) with another recipe")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError("this model is a torch.compile'd wrapper; pass the model inside (model._orig_mod), fp8fx compiles it itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module has no Python forward to capture; pass the module it was scripted from")
    for name, module in model.named_modules():
        if runtime_of(module) is not None:
            raise ModelError(f"the model holds one that is compiled by fp8fx already: {name!r}. Put the original there (fp8fx.unwrap)")
    if "forward" in vars(model):
        raise ModelError(
            f"the forward of this {type(model).__name__} is replaced on the instance (model.forward = ...), which hides the class's own "
            "and what fp8fx would put there. Remove it (del model.forward), or put the change into a subclass; for accelerate's hooks "
            "call accelerate.hooks.remove_hook_from_module(model) first, and compile before accelerator.prepare"
        )
    for name, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ModelError(f"parameter {name!r} is not initialized yet: call the model once, so that its lazy layers know their sizes")
    devices = sorted({str(t.device) for t in [*model.parameters(), *model.buffers()]})
    if len(devices) > 1:
        where: dict[str, str] = {}
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            where.setdefault(str(value.device), name)
        found = ", ".join(f"{device} ({name!r})" for device, name in sorted(where.items()))
        raise ModelError(f"the model lies on several devices: {found}. Move it to one with model.to(device), then compile")
    return model


def check_materialized(model: nn.Module) -> None:
    """ModelError if a tensor of the model has no values yet: there is nothing to compute a scale from."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in tensors:
            if value.is_meta:
                raise ModelError(
                    f"{kind} {name!r} lies on the meta device and has no values to quantize. Give the model memory with "
                    "model.to_empty(device=...), load or initialize its weights, and compile then; fp8fx.plan works on the meta device"
                )


def check_state(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], recipe: str) -> None:
    """ModelError if `state`, fp8fx's entries of a checkpoint without their prefix, is not of the form of `own`."""
    for key, value in state.items():
        if key not in own:
            close = nearest(PREFIX + key, [PREFIX + name for name in own])
            raise ModelError(
                f"the state_dict has {PREFIX + key!r}, which a model under the recipe {recipe!r} does not keep.{close} It was saved under "
                "another recipe or version; fp8fx.strip(state_dict) leaves the model's own entries"
            )
        form, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (value, own[key]))
        if form != wanted:
            raise ModelError(f"{PREFIX + key!r} of the state_dict is {form}, expected {wanted}")


def plain(fast: nn.Module) -> nn.Module:
    """A high-precision clone of a compiled model, of its original class."""
    runtime = runtime_of(fast)
    if runtime is None:
        raise CaptureError("this model is not compiled by fp8fx")
    made = clone(fast)
    vars(made).pop(RUNTIME)
    made.__class__ = base_class(fast)
    return made
