"""Which quantization each layer reads: layers that read one tensor alike (q, k and v) share one, which bears the name of the first.

    reads(graph after insert_qdq)   (layer, role) -> (layer, role) under which the quantization is observed

Roles are those of a recipe, and three more: `other`, the right operand of a product of two activations; and `query`, `key` and `value`
of an emulated attention, which is observed under names of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fp8fx.spec import ROLES

Key = tuple[str, str]  # layer, role
OPERANDS = ("query", "key", "value")
SHOWN = (*OPERANDS, "input", "weight", "other", *ROLES[2:])  # in the order of a table
ops = torch.ops.fp8fx


def reads(modules: Iterable[fx.GraphModule]) -> dict[Key, Key]:
    """Of all graphs of a model."""
    return {read: source for module in modules for node in module.graph.nodes for read, source in _of(node)}


def _of(node: fx.Node) -> Iterator[tuple[Key, Key]]:
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "fp8fx" or node.target is ops.quantize.default:
        return
    arguments = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    site = arguments.get("site")
    lists = [value for value in node.args if isinstance(value, (list, tuple)) and any(isinstance(entry, fx.Node) for entry in value)]
    for place, value in enumerate(lists):
        if (source := _quantization(value)) is not None and isinstance(site, str):
            role = source[1] if source[0] == site else _role(node.target, place, len(lists))
            yield (site, role), source


def _quantization(operand: Any) -> Key | None:
    node = operand[0]
    while isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not ops.quantize.default:
        return None
    return str(node.args[4]), str(node.args[5])


def _role(target: Any, place: int, count: int) -> str:
    """Of an operand that another layer reads too, and reads first."""
    if target is ops.embedding.default or (place == 1 and target is not ops.matmul.default):
        return "weight"
    return "input" if place == 0 else "other"


def of_layer(name: str, observed: Iterable[Key], read: dict[Key, Key]) -> dict[str, Key]:
    """role -> the key under which it was observed, in the order of SHOWN."""
    keys = set(observed)
    found = {role: key for (layer, role), key in read.items() if layer == name and key in keys}
    found |= {role: (name, role) for layer, role in keys if layer == name}
    found |= {operand: (f"{name}.{operand}", "input") for operand in OPERANDS if (f"{name}.{operand}", "input") in keys}
    return {role: found[role] for role in SHOWN if role in found}
