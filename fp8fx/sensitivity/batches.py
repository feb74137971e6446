"""The data of a study and its loss: taken once, checked, and told apart from the user's own mistakes.

A batch is what the loss takes. Without a `loss` it is one of

    (inputs, target)    inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Integer targets: cross entropy over the
                        last dimension of the output; floating ones: mean square error
    a mapping           keyword arguments of a model that returns a scalar, or something with a `loss`
    anything else       the one argument of such a model
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fp8fx.errors import FP8Error, ModelError

Loss = Callable[[nn.Module, Any], Any]
_ONE_LOSS = "the loss is one number per batch: a scalar tensor, such as cross_entropy(model(x), y)"


def take(data: Any, count: int | None) -> list[Any]:
    """The batches of `data`: all, or the first `count`. Raises ModelError for data that is empty, ends early or is not finite, or that
    fails when it is read."""
    if callable(data) and not isinstance(data, Iterable):
        name = getattr(data, "__name__", type(data).__name__)
        raise ModelError(f"data is an iterable of batches, got the function {name}: call it, data={name}()")
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        what = f"a tensor of shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
        raise ModelError(f"data is an iterable of batches, got {what}: if it is one batch, put it in a list, [batch]")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ModelError(f"batches is how many batches of data are used, an int from 1 on, or None for all; got {count!r}")
    batches: list[Any] = []
    try:
        batches.extend(itertools.islice(data, count))
    except FP8Error:
        raise
    except Exception as error:
        raise ModelError(f"batch {len(batches)} of data cannot be read: {type(error).__name__}: {error}") from error
    if not batches:
        raise ModelError("data holds no batch: a study needs at least one. (A generator that was read before is empty.)")
    if count is not None and len(batches) < count:
        raise ModelError(f"data ended after {len(batches)} of {count} batches: give more data, or batches={len(batches)}")
    for number, batch in enumerate(batches):
        _check_finite(number, batch)
    return batches


def _check_finite(number: int, batch: Any) -> None:
    leaves = pytree.tree_flatten_with_path(batch)[0]
    tensors = [(pytree.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    for where, x in tensors:
        if x.numel() == 0:
            raise ModelError(f"batch {number} of data{where} has no elements: its shape is {tuple(x.shape)}")
        if not x.is_floating_point() or bool(x.isfinite().all()) or _is_mask(x):
            continue
        bad = ~x.isfinite()
        first = tuple(bad.nonzero()[0].tolist())
        raise ModelError(
            f"batch {number} of data{where} is not finite: {int(bad.sum())} of {x.numel()} elements, the first at {first}: "
            f"{x[first].item()}"
        )


def _is_mask(x: Tensor) -> bool:
    """An additive mask: nothing but 0 and -inf."""
    return bool(((x == 0) | (x == -math.inf)).all())


def default_loss(model: nn.Module, batch: Any) -> Any:
    """See the module docstring. Raises ModelError where the model gives no loss and there is no target."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, target = batch
        output = _call(model, inputs)
        if isinstance(output, Tensor) and isinstance(target, Tensor):
            return _distance(output, target)
        raise ModelError(
            f"without loss=, a pair is (inputs, target) and the model gives a tensor; here the output is a {type(output).__name__} and "
            f"the target a {type(target).__name__}. Give loss=, a function of model and batch that returns a scalar"
        )
    output = _call(model, batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(found, Tensor) and found.numel() == 1:
        return found
    raise ModelError(
        f"the model gives no loss: its output is {_described(output)}. Give batches (inputs, target), or loss=, a function of model and "
        "batch that returns a scalar"
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point():
        if output.dim() < 2 or output.shape[:-1] != target.shape:
            raise ModelError(
                f"integer targets are classes: the output needs their shape {tuple(target.shape)} and a last dimension of classes, it has "
                f"{tuple(output.shape)}. Give loss= for another loss"
            )
        return F.cross_entropy(output.flatten(0, -2).float(), target.flatten())
    if output.shape != target.shape:
        raise ModelError(
            f"the target's shape is {tuple(target.shape)}, the output's {tuple(output.shape)}: they must be equal, or give loss="
        )
    return F.mse_loss(output.float(), target.float())


def check_loss(loss: Any) -> Loss:
    """`loss`, or the default one. Raises ModelError for what cannot be called with a model and a batch."""
    if loss is None:
        return default_loss
    if not callable(loss):
        raise ModelError(f"loss is a function of model and batch that returns a scalar, got a {type(loss).__name__}")
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError as error:
        raise ModelError(f"loss is called with model and batch, and this one cannot be: {error}") from None
    except ValueError:  # not everything callable has a signature
        pass
    return loss  # type: ignore[no-any-return]


def scalar(value: Any, number: int) -> Tensor:
    """What the loss returned, as a tensor of shape (). Raises ModelError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise ModelError(f"the loss of batch {number} is {_described(value)}: {_ONE_LOSS}")
    if value.numel() != 1 or value.is_complex():
        raise ModelError(f"the loss of batch {number} is a tensor of shape {tuple(value.shape)}, not a scalar: {_ONE_LOSS}")
    return value.reshape(())


def high_precision_loss(loss: Loss, model: nn.Module, batch: Any, number: int) -> float:
    """The loss of the plain model. ModelError, naming the batch, where the model or the loss cannot take it, or it is not finite."""
    try:
        value = scalar(loss(model, batch), number).item()
    except FP8Error:
        raise
    except Exception as error:
        raise ModelError(
            f"batch {number} of data, {_described(batch)}: in high precision already, the model or the loss fails on it: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value):
        raise ModelError(
            f"the loss of batch {number} is {value} in high precision already, so no layer's effect on it can be measured: look at the "
            f"model's weights and at this batch, {_described(batch)}"
        )
    return value


def _described(value: Any) -> str:
    """Shapes and types, for messages: `(float32 [8, 16], int64 [8])`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    return f"a {type(value).__name__}"
