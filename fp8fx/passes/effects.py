"""For every pass after *annotate*: in-place writes and changes of grad mode or autocast, across which no work may move.

    x.add_(1); y = F.relu(x, inplace=True); x[0] = 2; torch.add(a, b, out=x); with torch.no_grad(): ...

Dynamo keeps such calls as the user wrote them. Two tensors may share memory if their example values share a storage; where a value
is not known, they may.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fp8fx.capture.graph import tensor

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul, operator.setitem,
}  # fmt: skip
_BATCH_NORMS = {F.batch_norm, torch.batch_norm, F.instance_norm}
_MODES = ("_set_grad_enabled", "set_grad_enabled", "_enter_", "_exit_")


class Effects:
    """The writes and mode changes of one graph, by position. Nodes that a pass adds later stand where their predecessor stands."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writes = [(i, written) for node, i in self._position.items() for written in written_by(node)]
        self._modes = [i for node, i in self._position.items() if changes_mode(node)]

    def written_between(self, after: fx.Node, before: fx.Node, *tensors: Any) -> bool:
        """Something from `after` to `before`, both excluded, may write the memory of one of `tensors`."""
        if not self._writes:
            return False
        start, end = self._at(after), self._at(before)
        found = [written for i, written in self._writes if start < i < end]
        return any(may_share(written, x) for written in found for x in tensors if isinstance(x, fx.Node))

    def written_before(self, before: fx.Node, x: fx.Node) -> bool:
        """Something from the beginning of the graph to `before` may write the memory of `x`."""
        end = self._at(before) if self._writes else 0
        return any(i < end and may_share(written, x) for i, written in self._writes)

    def mode_changes_between(self, after: fx.Node, before: fx.Node) -> bool:
        """Grad mode or autocast changes between the two nodes."""
        start, end = (self._at(after), self._at(before)) if self._modes else (0, 0)
        return any(start < i < end for i in self._modes)

    def _at(self, node: fx.Node) -> int:
        while node not in self._position:
            node = node.prev
        return self._position[node]


def written_by(node: fx.Node) -> list[Any]:
    """The arguments whose memory a call writes."""
    if node.op == "call_method":
        name = str(node.target)
        in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name not in _NOT_IN_PLACE)
        return [node.args[0]] if in_place or name == "__setitem__" else []
    if node.op != "call_function":
        return []
    if node.kwargs.get("out") is not None:
        return [node.kwargs["out"]]
    if node.target in _IN_PLACE_OPERATORS:
        return [node.args[0]]
    if node.target in _BATCH_NORMS:
        return [x for x in (*node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")) if x is not None]
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target)
    name = str(getattr(node.target, "__name__", ""))
    if node.args and (_asks_in_place(node) or (name.endswith("_") and not name.endswith("__"))):
        return [node.args[0]]
    return []


_NOT_IN_PLACE = {"__index__", "__int__", "__invert__", "__init__", "__iter__"}


def _written_by_schema(node: fx.Node, target: torch._ops.OpOverload) -> list[Any]:
    if not target._schema.is_mutable:
        return []
    arguments = enumerate(target._schema.arguments)
    written = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in written]


def _asks_in_place(node: fx.Node) -> bool:
    """`inplace` is given and not False; a node there may be either."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    place = _place_of_inplace(node.target)
    return place is not None and place < len(node.args) and node.args[place] is not False


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature has no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


def changes_mode(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
    return name.startswith(_MODES)


def may_share(x: Any, y: Any) -> bool:
    """Whether two nodes' tensors may share memory."""
    first, second = _storage(x), _storage(y)
    return first is None or second is None or first == second


def _storage(node: Any) -> int | None:
    value = tensor(node)
    try:
        return None if value is None else int(value.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return None
