"""The one graph form both front ends give: what the passes may rely on.

    placeholder     a model input, or a parameter or buffer lifted to an input   meta: val, tensor_name ("fc.weight" or "")
    call_function   torch functions and operators; `call_method` only for tensor methods (view, transpose, softmax)
    call_module     only modules no front end looks into (recurrent layers)
    output          as the model returned it

Every node carries `meta["val"]` (fake or example value: shape, dtype, device, requires_grad) and `meta["module"]`, the dotted
path of the innermost module of the *root* model that made it ("" for the root itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

VAL = "val"
MODULE = "module"
TENSOR_NAME = "tensor_name"
SITE = "site"  # canonical site name, written by naming.assign_site_names
ALIASES = "aliases"  # further names of the same site, where the model holds its module under several


@dataclass
class Captured:
    """A captured graph. `complete` says that nothing of its frame is missing.

    starts, ends: it is known to begin where the model's forward begins, and to end where that ends.
    """

    module: fx.GraphModule
    complete: bool
    starts: bool = True
    ends: bool = True

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def val(node: Any) -> Any:
    """The example value of a node (a tensor, a number, a tuple), or the argument itself if it is no node."""
    return node.meta.get(VAL) if isinstance(node, fx.Node) else node


def tensor(node: Any) -> torch.Tensor | None:
    """The example tensor of a node, or None if it is not a tensor."""
    value = val(node)
    return value if isinstance(value, torch.Tensor) else None


def hint(size: Any, unknown: int = 1) -> int:
    """A concrete number for a size that may be symbolic, without adding a guard; `unknown` for one that was never seen."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    known = getattr(node, "hint", None)
    return int(known) if known is not None else unknown


def hints(shape: Any) -> tuple[int, ...]:
    return tuple(hint(s) for s in shape)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes keep their meta and Dynamo's own mark on placeholders. The original is never touched."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    made = graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    made.meta = dict(next(n for n in reversed(module.graph.nodes) if n.op == "output").meta)
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        # By this mark AOTAutograd takes the graph for Dynamo's, and its parameters for memory that is there anyway. Without it the
        # transposed codes of every weight are made in forward and kept, since they are half as large as the weight.
        copied._param_name_to_source = module._param_name_to_source
    return copied
