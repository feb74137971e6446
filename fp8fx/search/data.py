"""Calibration data: what comes in, checked batch by batch, and how a model is called on it.

A batch is what `fp8fx.plan` takes as example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Data of
another form (pairs of inputs and labels, say) need a `forward(model, batch)` that calls the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fp8fx.clone import clone
from fp8fx.errors import CaptureError, FP8Error, ModelError

Forward = Callable[[nn.Module, Any], Any]


def batches_of(data: Any, batches: int | None = None) -> list[Any]:
    """The batches of `data`, the first `batches` of them where that is given, each checked; a tensor or a dict is one batch.

    Raises ModelError where there is none, where there are fewer than asked for, and for a batch without tensors or elements, with NaN or
    inf, or of another form (count of tensors, dtypes, dimensions) than the first.
    """
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ModelError(
            f"batches is how many batches of the calibration data are used, an int from 1 on, or None for all; got {batches!r}"
        )
    one = isinstance(data, Tensor | Mapping)
    if not one and not isinstance(data, Iterable):
        raise ModelError(f"calibration data is a tensor, a dict of keyword arguments, or an iterable of batches; got {type(data).__name__}")
    found = [data] if one else list(data if batches is None else islice(data, batches))
    if not found:
        raise ModelError("the calibration data is empty: it gave no batch. (An iterator that was read to its end before gives none.)")
    if batches is not None and len(found) < batches:
        raise ModelError(
            f"the calibration data was exhausted midway: batches={batches}, and it gave {len(found)}. Give more, or ask for fewer"
        )
    for number, batch in enumerate(found):
        _check(batch, found[0], number)
    return found


def _check(batch: Any, first: Any, number: int) -> None:
    tensors = _tensors(batch)
    where = f"calibration batch {number}"
    if not tensors:
        raise ModelError(f"{where} holds no tensor: it is a {type(batch).__name__}")
    for tensor in tensors:
        if tensor.numel() == 0:
            raise ModelError(f"{where} is empty: it holds a tensor of shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{where} is not finite: {count} of the {tensor.numel()} elements of a tensor {tuple(tensor.shape)} are NaN or inf, "
                "and no scale could be computed from it"
            )
    form, wanted = _form(batch), _form(first)
    if form != wanted:
        raise ModelError(f"{where} has another form than batch 0: {form}, and batch 0 is {wanted}. Sizes may differ, these may not")


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _form(batch: Any) -> str:
    parts = [f"{str(t.dtype).removeprefix('torch.')} with {t.dim()} dimensions" for t in _tensors(batch)]
    return f"{type(batch).__name__} of {', '.join(parts)}"


def call(model: nn.Module, batch: Any, forward: Forward | None, number: int) -> Any:
    """The model on one batch. What the model raises becomes a ModelError that names the batch and its shapes."""
    try:
        if forward is not None:
            return forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except FP8Error as error:
        if not (isinstance(error, CaptureError) and "forward fails on these inputs" in str(error)):
            raise
        raise _refused(batch, forward, number, error) from error
    except Exception as error:
        raise _refused(batch, forward, number, error) from error


def _refused(batch: Any, forward: Forward | None, number: int, error: Exception) -> ModelError:
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in _tensors(batch))
    said = str(error).rstrip(". \n") or type(error).__name__
    hint = "" if forward is not None else " If the batch holds more than the model's arguments, give forward=lambda model, batch: ..."
    return ModelError(f"the model cannot run on calibration batch {number} ({shapes}): {said}.{hint}")


@torch.no_grad()
def check_runs(model: nn.Module, batches: list[Any], forward: Forward | None) -> None:
    """The plain model, eagerly, on the first batch of each shape: what it cannot take is said before anything is captured of it."""
    plain, known = clone(model, share_buffers=False).eval(), set()
    for number, batch in enumerate(batches):
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        if shapes not in known:
            call(plain, batch, forward, number)
            known.add(shapes)


@torch.no_grad()
def run_all(model: nn.Module, batches: list[Any], forward: Forward | None) -> None:
    """The model on every batch, without gradients."""
    for number, batch in enumerate(batches):
        call(model, batch, forward, number)
