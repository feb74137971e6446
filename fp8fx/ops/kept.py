"""Memory that a backward writes into must be that of the forward: records are kept on ctx itself, and not saved for backward.

What is saved for backward goes through saved-tensor hooks (torch.autograd.graph.save_on_cpu), which may hand a copy to backward; an amax
measured into a copy is lost. AOTAutograd saves what its own backward graph reads, but for nodes that bear torch's mark for tensors that
an autograd function keeps on ctx.

CUDA graphs copy as well, at each call, what they are not told to be static. A backward's saved tensors are, unless Inductor has cut the
forward into several CUDA graphs (around an operator that cannot be captured): then only those that are inputs of the forward as they
stand, and a row of the records is a view of one. So records have a mark of their own, and `static_records` tells Inductor where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor

MARK = "saved_tensor_with_no_vc_check"  # torch 2.13 reads it; one that does not know it passes it over
RECORD = "fp8fx_record"


def keep(ctx: Any, *records: Tensor | None) -> None:
    """ctx.records = records, which are inputs of the operator."""
    ctx.records = tuple(mark(record) for record in records)


def mark(record: Tensor | None) -> Tensor | None:
    """`record`; where a graph is traced, AOTAutograd keeps it as it is for the backward graph, and each tensor that it is a part of."""
    if record is None or proxy_tensor.get_proxy_mode() is None:
        return record
    for proxy in getattr(proxy_tensor, "_get_proxies", lambda _: [])(record):
        node = proxy.node
        while node is not None:
            node.meta[MARK] = node.meta[RECORD] = True
            node = next(iter(node.all_input_nodes), None)
    return record


def static_records(inner_compile: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's `inner_compile`, told that records stay where they are: a CUDA graph would measure into copies of them."""

    def compile_graph(module: fx.GraphModule, example_inputs: Any, **how: Any) -> Any:
        records = {place for place, node in enumerate(module.graph.find_nodes(op="placeholder")) if node.meta.get(RECORD)}
        if records:
            how["static_input_idxs"] = sorted(records.union(how.get("static_input_idxs") or ()))
        return inner_compile(module, example_inputs, **how)

    return compile_graph
