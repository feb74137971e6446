"""Memory that a backward writes into must be that of the forward: records are kept on ctx itself, and not saved for backward.

What is saved for backward goes through saved-tensor hooks (torch.autograd.graph.save_on_cpu), which may hand a copy to backward; an amax
measured into a copy is lost. AOTAutograd saves what its own backward graph reads, but for nodes that bear torch's mark for tensors that
an autograd function keeps on ctx.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.experimental import proxy_tensor

MARK = "saved_tensor_with_no_vc_check"  # torch 2.13 reads it; one that does not know it passes it over


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
            node.meta[MARK] = True
            node = next(iter(node.all_input_nodes), None)
    return record
