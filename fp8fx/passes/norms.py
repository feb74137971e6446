"""For *lower*: which nodes are norms over the last dimension, and what they read."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fp8fx.capture.graph import tensor

ADDITIONS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_NAMES: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.layer_norm: ("layer", ("input", "normalized_shape", "weight", "bias", "eps")),
    torch.layer_norm: ("layer", ("input", "normalized_shape", "weight", "bias", "eps")),
    F.rms_norm: ("rms", ("input", "normalized_shape", "weight", "eps")),
    torch.rms_norm: ("rms", ("input", "normalized_shape", "weight", "eps")),
}


@dataclass(frozen=True)
class Norm:
    """A norm of `x`; kind as in ops/norms.py; nodes: all that compute it, the first one first, from x to the norm's output."""

    x: fx.Node
    weight: Any
    bias: Any
    kind: str
    eps: float
    nodes: tuple[fx.Node, ...]


def norm_of(node: Any) -> Norm | None:
    """The norm whose output `node` is, or None."""
    if not isinstance(node, fx.Node):
        return None
    return _llama(node) if node.target not in _NAMES else _call(node)


def _call(node: fx.Node) -> Norm | None:
    kind, names = _NAMES[node.target]
    given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5 if kind == "layer" else None}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    x = tensor(given["input"])
    if x is None or tuple(given["normalized_shape"]) != tuple(x.shape[-1:]):
        return None
    eps = torch.finfo(x.dtype).eps if given["eps"] is None else given["eps"]
    if isinstance(eps, fx.Node):  # with dynamic=True an attribute of the model is an input of the graph
        return None
    return Norm(given["input"], given["weight"], given["bias"], kind, float(eps), (node,))


def _llama(node: fx.Node) -> Norm | None:
    """weight * (h * rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(dtype of x), with h = x.to(float32)."""
    weight, back = _factors(node, _is_cast)
    scaled = back.args[0] if back is not None else None
    h, root = _factors(scaled, lambda n: n.target in (torch.rsqrt, "rsqrt"))
    if weight is None or back is None or h is None or root is None or not _is_cast(h):
        return None
    eps, mean = _sum(root.args[0])
    square = mean.args[0] if mean is not None and mean.target in ("mean", torch.mean) else None
    if eps is None or not isinstance(square, fx.Node) or square.target not in ("pow", torch.pow) or square.args != (h, 2):
        return None
    over = {"dim": mean.args[1] if len(mean.args) > 1 else None, "keepdim": mean.args[2] if len(mean.args) > 2 else False} | mean.kwargs
    x, y, single = tensor(h.args[0]), tensor(back), tensor(h)
    if over["dim"] not in (-1, [-1], (-1,)) or over["keepdim"] is not True or None in (x, y, single):
        return None
    nodes = (h, square, mean, root.args[0], root, scaled, back, node)
    if x.dtype != y.dtype or single.dtype != torch.float32 or any(set(n.users) - set(nodes) for n in nodes[:-1]):  # type: ignore[union-attr]
        return None
    return Norm(h.args[0], weight, None, "rms_rounded", eps, nodes)  # type: ignore[arg-type]


def _factors(node: Any, second: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """(a, b) of a * b or b * a where `second` holds of b."""
    if not isinstance(node, fx.Node) or node.target not in _PRODUCTS or node.kwargs or len(node.args) != 2:
        return None, None
    for a, b in (node.args, node.args[::-1]):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and second(b):
            return a, b
    return None, None


def _sum(node: Any) -> tuple[float | None, Any]:
    """(eps, mean) of mean + eps."""
    if not isinstance(node, fx.Node) or node.target not in ADDITIONS or node.kwargs or len(node.args) != 2:
        return None, None
    mean, eps = node.args
    return (float(eps), mean) if isinstance(eps, float) and isinstance(mean, fx.Node) else (None, None)


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("to", "type_as", "float") and not node.kwargs and isinstance(node.args[0], fx.Node)
