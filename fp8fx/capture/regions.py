"""Activation checkpointing: Dynamo keeps a checkpointed part as a call of a graph of its own. Passes want one flat graph.

    inline_regions    y = tag_activation_checkpoint(body, x, w)   ->   the body's own nodes, marked meta["region"]
    outline_regions   nodes marked with one region                ->   tag_activation_checkpoint(new body, ...)

Nodes that passes add inherit the mark from the node they come from, so what belonged to a region is recomputed with it: its
quantized inputs, the rewritten operators. The random stream is an input, so a recomputation draws the same bits.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fp8fx.errors import PassError

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
REGION = "region"  # meta key: (number, keyword arguments of the checkpoint call), hashable


def inline_regions(module: fx.GraphModule) -> None:
    """Write every checkpointed body into the graph; bodies inside bodies too, under the mark of the outermost."""
    number = 0
    while calls := module.graph.find_nodes(op="call_function", target=CHECKPOINT):
        for call in calls:
            mark = call.meta.get(REGION) or (number, tuple(sorted(call.kwargs.items())))
            number += 1
            _inline(module, call, mark)
    module.graph.lint()


def _inline(module: fx.GraphModule, call: fx.Node, mark: Any) -> None:
    holder = call.args[0]
    assert isinstance(holder, fx.Node)
    body: fx.GraphModule = getattr(module, str(holder.target))
    mapping: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True))
    results: Any = ()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            results = fx.map_arg(node.args[0], mapping.__getitem__)
            continue
        if node.op == "get_attr":  # a body inside the body
            setattr(module, f"{holder.target}_{node.target}", getattr(body, str(node.target)))
        with module.graph.inserting_before(call):
            mapping[node] = made = module.graph.node_copy(node, mapping.__getitem__)
        if node.op == "get_attr":
            made.target = f"{holder.target}_{node.target}"
        made.meta = {**node.meta, REGION: mark}
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    if not holder.users:
        module.graph.erase_node(holder)


def outline_regions(module: fx.GraphModule) -> bool:
    """Put every marked region back into a body of its own, behind one checkpoint call."""
    regions: dict[Any, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if REGION in node.meta and node.target is not CHECKPOINT:
            regions.setdefault(node.meta[REGION], []).append(node)
    for index, (mark, nodes) in enumerate(regions.items()):
        _outline(module, f"checkpointed_{index}", mark, nodes)
    return bool(regions)


def _outline(module: fx.GraphModule, name: str, mark: tuple[int, tuple[tuple[str, Any], ...]], nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    inputs = list(dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[node].meta = {key: value for key, value in node.meta.items() if key != REGION}
    graph.output(tuple(mapping[node] for node in outputs))
    module.add_submodule(name, fx.GraphModule(module, graph))
    with module.graph.inserting_after(_last(module.graph, [*nodes, *inputs])):
        holder = module.graph.get_attr(name)
    with module.graph.inserting_after(holder):
        call = module.graph.call_function(CHECKPOINT, (holder, *inputs), dict(mark[1]))
    call.meta = {"module": nodes[0].meta.get("module", "")}
    place = call
    for i, node in enumerate(outputs):
        with module.graph.inserting_after(place):
            place = module.graph.call_function(operator.getitem, (call, i))
        place.meta = {key: value for key, value in node.meta.items() if key != REGION}
        node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)
    _check_order(module.graph, call)


def _last(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return next(node for node in reversed(graph.nodes) if node in wanted)


def _check_order(graph: fx.Graph, call: fx.Node) -> None:
    """Nothing before the call may read what it gives: a pass would have torn the region apart."""
    given = {call, *call.users}
    for node in graph.nodes:
        if node is call:
            return
        if given & set(node.all_input_nodes):
            raise PassError(f"{node.name} reads a checkpointed region in the middle of it; a pass moved it out of the region's order")
