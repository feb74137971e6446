"""`fp8fx.compile`: a compiled clone of a model; and what goes with it: `plan`, `unwrap`, `step`, `state_dict`, ..."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fp8fx.capture import symbolic
from fp8fx.capture.layers import module_types
from fp8fx.clone import PREFIX, QUANTIZERS, RUNTIME, check_materialized, check_model, clone, compiled_class, plain, runtime_of, runtimes_of
from fp8fx.entries import unmatched
from fp8fx.errors import CaptureError, ModelError
from fp8fx.options import Options
from fp8fx.plan import Plan
from fp8fx.recipe import Recipe
from fp8fx.runtime import Runtime

M = TypeVar("M", bound=nn.Module)
RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def compile(
    model: M,
    recipe: RecipeLike = "hybrid",
    *,
    exempt: Sequence[Any] = (),
    output_fused: Sequence[Any] = (),
    inner: str = "auto",
    inner_mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    capture: str = "dynamo",
    on_capture_error: str = "raise",
) -> M:
    """A clone of `model` that runs in FP8 as `recipe` says. The model itself stays as it is, in high precision.

    The clone has the same classes, attributes, hooks and flags, and the *same* Parameter and buffer tensors under the same names:
    an optimizer made for one serves the other. It is captured at its first call per signature.

    recipe: a shipped name (`fp8fx recipe list`), a path to a YAML file, a dict or a Recipe. exempt, output_fused: added to it.
    inner: what compiles the rewritten graph. auto is Inductor on a CUDA device and eager (exact, bit for bit) elsewhere.
    inner_mode: a torch.compile mode for Inductor. fullgraph, dynamic: as in torch.compile.
    capture: dynamo, or symbolic for torch.fx tracing, which fails here and now on what it cannot follow.
    on_capture_error: raise, or eager: run in high precision with one warning.

    Raises RecipeError (recipe, or a pattern that matches nothing), ModelError (not a module, already compiled, on several
    devices or on meta, cannot be copied); the first call raises CaptureError if the model cannot be captured.
    """
    check_materialized(check_model(model))
    options = Options(inner, inner_mode, fullgraph, dynamic, capture, on_capture_error)
    options.check()
    loaded = Recipe.load(recipe).with_overrides(exempt=exempt, output_fused=output_fused)
    loaded.check_names(module_types(model))
    if capture == "symbolic" and on_capture_error == "raise":
        symbolic.trace(model)
    return _compiled(model, loaded, options)


def _compiled(model: M, recipe: Recipe, options: Options, share_buffers: bool = True) -> M:
    fast = clone(model, share_buffers)
    base = type(model)
    runtime = Runtime(recipe, options)
    vars(fast)[RUNTIME] = runtime
    fast.__class__ = compiled_class(base)
    runtime.attach(fast)
    runtime.original = model
    return fast  # type: ignore[return-value]


def plan(
    model: nn.Module,
    recipe: RecipeLike = "hybrid",
    *,
    example_inputs: Any = None,
    exempt: Sequence[Any] = (),
    output_fused: Sequence[Any] = (),
    capture: str | None = None,
) -> Plan:
    """What `recipe` would do to `model`, without changing or compiling it.

    example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; the model runs once on them, in
    high precision, without gradients, with its buffers and the random state kept. Without them the model is traced
    symbolically: layers and reasons, but no shapes and no FLOPs. Of a compiled model it gives its own plan; also of what
    torch.compile(backend="fp8fx") returned, as far as that is captured.
    """
    if runtime_of(model) is not None or (isinstance(model, torch._dynamo.OptimizedModule) and runtimes_of(model)):
        return runtimes_of(model)[-1].plan()  # type: ignore[no-any-return]
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError(
            "nothing of fp8fx is captured in this torch.compile'd model so far: under backend='fp8fx' call it once before its plan. "
            "To see a plan before that: fp8fx.plan(model._orig_mod, recipe, example_inputs=...)"
        )
    check_model(model)
    capture = capture or ("symbolic" if example_inputs is None else "dynamo")
    options = Options(capture=capture, plan_only=True)
    options.check()
    loaded = Recipe.load(recipe).with_overrides(exempt=exempt, output_fused=output_fused)
    loaded.check_names(module_types(model))
    if example_inputs is None and capture == "dynamo":
        raise CaptureError("capture='dynamo' runs the model, so it needs example_inputs: a tensor, a tuple or a dict")
    probe = _compiled(model, loaded, options, share_buffers=False)
    if example_inputs is None:
        runtime = runtime_of(probe)
        captured, _ = symbolic.from_symbolic(symbolic.trace(model), (), probe)
        runtime.rewrite(captured, (), symbolic.append_placeholder)
        return runtime.plan()  # type: ignore[no-any-return]
    args, kwargs = _arguments(model, example_inputs)
    devices = [t.device for t in model.parameters() if t.is_cuda]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        probe(*args, **kwargs)
    return runtime_of(probe).plan()  # type: ignore[no-any-return]


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        signature = inspect.signature(model.forward)
        try:
            signature.bind(**example_inputs)
        except TypeError as error:
            names = ", ".join(signature.parameters)
            raise ModelError(f"example_inputs do not fit {type(model).__name__}.forward({names}): {error}") from None
        return (), dict(example_inputs)
    return (tuple(example_inputs), {}) if isinstance(example_inputs, (tuple, list)) else ((example_inputs,), {})


def unwrap(fast: nn.Module) -> nn.Module:
    """The model that was passed to `compile`; for a copy of a compiled model, a high-precision clone sharing its tensors."""
    runtime = runtime_of(fast)
    if runtime is None:
        raise ModelError("this model is not compiled by fp8fx: there is nothing to unwrap")
    return runtime.original if runtime.original is not None else plain(fast)


def invalidate(fast: nn.Module) -> None:
    """Drop kept quantized weights. Needed after writing to weights through `.data`, which torch cannot notice.

    peft's `merge_adapter` and `unmerge_adapter` write so. `fast` may also be a model under torch.compile(backend="fp8fx").
    """
    runtimes = runtimes_of(fast)
    if not runtimes:
        raise ModelError("this model is not compiled by fp8fx: it keeps no quantized weights")
    for runtime in runtimes:
        runtime.weights.clear()


def step(fast: nn.Module) -> None:
    """Say that the weights were updated, where no torch optimizer that holds the model's own parameters does it.

    A step of delayed scaling and of the random stream ends. `fast` may also be a model under torch.compile(backend="fp8fx").
    """
    runtimes = runtimes_of(fast)
    if not runtimes:
        raise ModelError("this model is not compiled by fp8fx: it has no steps")
    for runtime in runtimes:
        runtime.optimizer_stepped()


def state_dict(fast: nn.Module) -> dict[str, Tensor]:
    """fp8fx's own part of `fast.state_dict()`: plain tensors under one prefix, also of compiled models inside.

    Of a model under torch.compile(backend="fp8fx"), whose own state_dict has no such part, it is the state of what was captured so far;
    `load_state_dict` takes it back.
    """
    if runtime_of(fast) is None and (runtimes := runtimes_of(fast)):
        return {PREFIX + key: value for runtime in runtimes for key, value in runtime.state().items()}
    return {key: value for key, value in fast.state_dict().items() if _ours(key)}


def load_state_dict(fast: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take back what `state_dict` gave, and nothing else. A model under torch.compile must have run once.

    Raises ModelError, with nothing loaded, for a state of another recipe.
    """
    runtimes = runtimes_of(fast)
    if len(runtimes) != 1:
        raise ModelError(
            f"fp8fx.load_state_dict takes a model with one fp8fx state, this one has {len(runtimes)}: call a model under "
            "torch.compile(backend='fp8fx') once before, and load compiled models inside of another one by one"
        )
    ours = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    missing, unknown = unmatched(ours, dict(runtimes[0].root.named_modules(remove_duplicate=False)))
    if missing or unknown:
        lists = (
            f"{what} {', '.join(repr(PREFIX + key) for key in keys[:4])}" for what, keys in (("lacks", missing), ("has", unknown)) if keys
        )
        raise ModelError(
            f"this state is not of this model: it {' and '.join(lists)}. Take all that fp8fx.state_dict gave, of the same model"
        )
    runtimes[0].load_state(ours)


def _ours(key: str) -> bool:
    return f".{PREFIX}" in f".{key}" or f".{QUANTIZERS}." in f".{key}"


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` without fp8fx's own entries, also those of compiled models inside: exactly the original model's keys.

    Raises ModelError where `state` is no mapping, such as the model itself.
    """
    if not isinstance(state, Mapping):
        raise ModelError(f"fp8fx.strip takes a state_dict, got {type(state).__name__}; for a model: fp8fx.strip(model.state_dict())")
    return {key: value for key, value in state.items() if not _ours(key)}
