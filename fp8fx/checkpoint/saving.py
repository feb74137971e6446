"""`fp8fx.save`: everything a run needs to go on, in one file that is there whole or not at all."""

from __future__ import annotations

import os
from typing import Any, overload

import torch

from fp8fx.checkpoint.format import VERSION
from fp8fx.checkpoint.parts import SAVES, Model, class_name, find, gradients, listed, model_and_path, optimizer_part
from fp8fx.checkpoint.tree import Encoder
from fp8fx.checkpoint.write import target_of, write
from fp8fx.clone import PREFIX


@overload
def save(
    fast: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    extra: Any = None,
    gradients: bool = True,
) -> None: ...
@overload
def save(
    path: str | os.PathLike[str],
    fast: torch.nn.Module,
    *,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    extra: Any = None,
    gradients: bool = True,
) -> None: ...
def save(
    *fast_and_path: Any,
    optimizer: Any = None,
    scaler: Any = None,
    scheduler: Any = None,
    extra: Any = None,
    gradients: bool = True,
    **named: Any,
) -> None:
    """save(fast, path, ...): write a compiled model and what trains it to one safetensors file, atomically; `fp8fx.load` takes it back.

    The file holds the model's parameters and buffers, fp8fx's state (position in the random stream, delayed scales with their history and
    the amax of the step so far) and, where they are given:
    optimizer, scheduler: one or a list. scaler: fp8fx.GradScaler or torch's.
    extra: plain data and tensors of your own, such as {"epoch": 3, "rng": torch.get_rng_state()}; returned by load.
    gradients: also each parameter's .grad, which a run stopped in the middle of gradient accumulation needs. Gradients that an optimizer
    step has used up are saved too: call optimizer.zero_grad() before, or pass False, for a smaller file.

    fast: what fp8fx.compile returned, a module that holds such models, either inside DistributedDataParallel (save on one rank), or
    what torch.compile(backend="fp8fx") returned, after its first call.
    path: of the file. The two may stand in either order, and be named fast= and path=, here and in load.

    If it fails, or the process is killed, the file that was at `path` is still there, whole. docs/checkpoints.md says more.
    Raises ModelError (not a compiled model) and CheckpointError (what cannot be written: the path, the disk, an object in `extra`).
    """
    fast, path = model_and_path(SAVES, fast_and_path, named)
    model = find(fast, SAVES)
    target = target_of(path)
    encoder = Encoder()
    with torch.no_grad():
        parts = _parts(encoder, model, optimizer, scaler, scheduler, extra, gradients)
        about = {"fp8fx": _version(), "torch": str(torch.__version__), "recipes": model.recipes()}
        write(target, {**about, "parts": parts}, encoder.tensors)


def _parts(encoder: Encoder, model: Model, optimizer: Any, scaler: Any, scheduler: Any, extra: Any, with_gradients: bool) -> Any:
    """The JSON of all parts. The model comes first: tensors that occur again are kept under its names."""
    entries = {name: _entry(encoder, value, name) for name, value in model.entries().items()}
    state = {
        prefix: _dict({key: encoder.tensor(value, f"{prefix}{PREFIX}{key}") for key, value in found.items()})
        for prefix, found in model.state().items()
    }
    optimizers = [optimizer_part(entry, model, SAVES) for entry in listed(optimizer, "optimizer", SAVES)]
    around = {
        "optimizer": optimizers if optimizer is not None else None,
        "scaler": _stateful(scaler, "scaler"),
        "scheduler": _stateful(scheduler, "scheduler"),
        "gradients": gradients(model) if with_gradients else None,
        "extra": extra,
    }
    own = [["model", _dict(entries)], ["fp8", _dict(state)]]
    return {"dict": own + [[name, encoder.encode(value, name)] for name, value in around.items()]}


def _dict(codes: dict[str, Any]) -> dict[str, Any]:
    """A dict whose values are encoded already."""
    return {"dict": [[key, code] for key, code in codes.items()]}


def _entry(encoder: Encoder, value: Any, name: str) -> Any:
    """Of a state_dict: a tensor under its own name, or what a module's get_extra_state gave."""
    return encoder.tensor(value, name) if isinstance(value, torch.Tensor) else encoder.encode(value, f"model/{name}")


def _stateful(given: Any, kind: str) -> list[dict[str, Any]] | None:
    return None if given is None else [{"class": class_name(entry), "state": entry.state_dict()} for entry in listed(given, kind, SAVES)]


def _version() -> str:
    import fp8fx

    return f"{fp8fx.__version__} (format {VERSION})"
