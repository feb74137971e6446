"""Plain data and tensors as JSON and a table of tensors, and back: what a checkpoint may hold, and how it is written down.

    [1, (2.5, None), {"a": tensor}]
    [1, {"tuple": [2.5, null]}, {"dict": [["a", {"tensor": "_fp8fx./extra/2/a"}]]}]

Nothing is pickled, so that reading a file runs no code of the file's. A type that is not here is refused with its place.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8fx.checkpoint.format import ADDED
from fp8fx.errors import CheckpointError

MAPPINGS: dict[str, type[dict]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
DEPTH = 100  # nobody nests deeper; a structure that holds itself does
ALLOWED = "None, bool, int, float, complex, str, bytes, torch.dtype, torch.device, numpy arrays, tensors; lists, tuples and dicts of these"


class Encoder:
    """Encodes trees into JSON, and collects their tensors by name. The same tensor under two names is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def tensor(self, value: Tensor, name: str) -> dict[str, str]:
        """A reference to `value`, which is written as `name` unless it is there already."""
        key = _identity(check_tensor(value, name))
        if key not in self._known:
            name = name.encode(errors="replace").decode()
            while name in self.tensors:  # {1: tensor, "1": tensor}
                name += "'"
            self.tensors[name] = value.detach()
            self._known[key] = name
        return {"tensor": self._known[key]}

    def encode(self, value: Any, where: str, depth: int = 0) -> Any:
        """`where` is the path of `value`, such as `optimizer/0/state`: for messages, and for the names of tensors."""
        if depth > DEPTH:
            raise CheckpointError(f"{where[:200]} is nested more than {DEPTH} deep; does it hold itself?")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return self.tensor(value, f"{ADDED}{where}")
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {"ndarray": self.tensor(torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)), f"{ADDED}{where}")["tensor"]}
        if isinstance(value, np.generic) and value.dtype.kind in "biufcU":
            return self.encode(value.item(), where, depth + 1)
        return self._container(value, where, depth)

    def _container(self, value: Any, where: str, depth: int) -> Any:
        def inside(items: Any) -> list[Any]:
            return [self.encode(item, f"{where}/{i}", depth + 1) for i, item in enumerate(items)]

        if type(value) is list:
            return inside(value)
        if type(value) in (tuple, torch.Size):
            return {"tuple": inside(value)}
        for name, kind in MAPPINGS.items():
            if type(value) is kind:
                keys = [(key, self.encode(key, f"{where}/(key)", depth + 1)) for key in value]
                return {name: [[code, self.encode(value[key], f"{where}/{key}", depth + 1)] for key, code in keys]}
        return _leaf(value, where)


def _leaf(value: Any, where: str) -> Any:
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [str(value.real), str(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which fp8fx.save cannot write without pickle. A checkpoint "
        f"holds {ALLOWED}; turn it into those (vars(x), dataclasses.asdict(x), x.state_dict(), str(x))"
    )


def check_tensor(value: Tensor, name: str) -> Tensor:
    """The tensor if its values can be written as they are, else CheckpointError."""
    if type(value) not in PLAIN:
        raise CheckpointError(
            f"{name!r} is a {type(value).__name__}, not a plain tensor. Sharded models are saved by torch.distributed.checkpoint with "
            "fp8fx.DistributedState; of others take what they are made of (x.full_tensor(), x.dequantize())"
        )
    if value.is_meta or value.layout is not torch.strided or value.is_quantized:
        kind = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else f"{value.layout}"
        advice = "Clear sparse gradients before saving (optimizer.zero_grad()), or pass gradients=False." if value.is_sparse else ""
        raise CheckpointError(f"{name!r} is {kind}: fp8fx.save writes dense tensors that have values. {advice}".rstrip())
    return value


def _identity(value: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen the same way; an empty one is only itself."""
    if not value.numel():
        return (id(value),)
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device, value.is_conj(), value.is_neg())


def decode(code: Any, tensors: dict[str, Tensor]) -> Any:
    """What `Encoder.encode` was given. Raises CheckpointError for JSON that it did not write."""
    if isinstance(code, list):
        return [decode(item, tensors) for item in code]
    if not isinstance(code, dict):
        return code
    if len(code) != 1:
        raise CheckpointError(f"the checkpoint's manifest has an entry of no known form: {str(code)[:80]}")
    ((kind, value),) = code.items()
    try:
        return _decoded(kind, value, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's manifest has a damaged {kind!r} entry: {error}") from None


def _decoded(kind: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if kind == "tensor":
        return tensors[value]
    if kind == "ndarray":
        return tensors[value].numpy()
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in value)
    if kind in MAPPINGS:
        pairs = {decode(key, tensors): decode(item, tensors) for key, item in value}
        return MAPPINGS[kind](pairs)
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(float(value[0]), float(value[1]))
    if kind == "bytes":
        return base64.b64decode(value, validate=True)
    if kind == "dtype" and isinstance(found := getattr(torch, value, None), torch.dtype):
        return found
    if kind == "device":
        return torch.device(value)
    raise ValueError(f"unknown kind {kind!r} with {str(value)[:40]!r}")
