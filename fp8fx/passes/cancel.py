"""cancel: no tensor is quantized twice, and nothing is dequantized that nobody reads.

enters   a graph with explicit quantize and dequantize nodes
leaves   the same numbers from fewer nodes
holds    codes that are kept are the codes that were there

    quantize(x); quantize(x)                  ->  quantize(x)                   shared inputs: q, k, v; gate, up
    quantize(dequantize(q))                   ->  q                             chained linears (unscaled, deterministic)
    quantize(view(dequantize(q)))             ->  view(q)                       the same through shape operations
    linear(dequantize(q) as anchor, ...)      ->  linear(anchor of q's source)  the dequantized tensor is never made
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx import formats
from fp8fx.capture.graph import VAL, tensor
from fp8fx.passes.contract import Context, PassResult, Skip, emit, finish, item
from fp8fx.passes.effects import Effects
from fp8fx.passes.reads import read_only_as_anchor
from fp8fx.spec import TensorSpec

ops = torch.ops.fp8fx
QUANTIZE, DEQUANTIZE = ops.quantize.default, ops.dequantize.default

# Shape operations that move elements and change none: quantizing commutes with them where there is one scale, or none.
SHAPE_METHODS = {"view", "reshape", "transpose", "permute", "contiguous", "flatten", "unsqueeze", "squeeze", "unflatten", "t"}


def cancel(module: fx.GraphModule, context: Context) -> PassResult:
    skips: list[Skip] = []
    effects = Effects(module.graph)
    modified = _merge_equal(module.graph, effects)
    modified |= _cancel_pairs(module.graph, effects, skips)
    modified |= _merge_equal(module.graph, effects)
    modified |= _drop_unread(module.graph)
    return finish(module, modified, skips)


def _merge_equal(graph: fx.Graph, effects: Effects) -> bool:
    """`quantize(x); quantize(x) = quantize(x)`: equal arguments, random bits included, give equal codes.

    Unless something writes x in between: then the later one stands for those that follow.
    """
    seen: dict[tuple[Any, ...], fx.Node] = {}
    modified = False
    for node in list(graph.find_nodes(op="call_function", target=QUANTIZE)):
        key = tuple(tuple(arg) if isinstance(arg, (list, tuple)) else arg for arg in node.args)
        spec = TensorSpec.parse(str(node.args[1]))
        key = key if spec.stochastic else (*key[:3], *key[6:])  # site and role only name random bits
        kept = seen.setdefault(key, node)
        if kept is not node and effects.written_between(kept, node, node.args[0]):
            seen[key] = node
        elif kept is not node:
            for user in list(node.users):
                user.replace_all_uses_with(item(graph, kept, user.args[1]))  # type: ignore[arg-type]
                graph.erase_node(user)
            graph.erase_node(node)
            modified = True
    return modified


def _cancel_pairs(graph: fx.Graph, effects: Effects, skips: list[Skip]) -> bool:
    """`quantize(dequantize(q)) = q`, also through shape operations."""
    modified = False
    for node in list(graph.find_nodes(op="call_function", target=QUANTIZE)):
        chain, source = _shape_chain(node.args[0])
        if source is None or source.target is not DEQUANTIZE:
            continue
        wanted, had = TensorSpec.parse(str(node.args[1])), TensorSpec.parse(str(source.args[3]))
        if not _equal_codes(wanted, had, source.args[4]):
            skips.append(Skip("quantize(dequantize(q)) = q", node.name, f"{had.text} and {wanted.text} do not give equal codes"))
            continue
        if effects.written_between(source, node, source, *chain):
            skips.append(Skip("quantize(dequantize(q)) = q", node.name, "the dequantized tensor is written in place before it is read"))
            continue
        q, scale = source.args[1], source.args[2]
        for step in reversed(chain):
            with graph.inserting_after(step):
                moved = graph.call_method(str(step.target), (q, *step.args[1:]), step.kwargs)  # type: ignore[arg-type]
            moved.meta = {k: v for k, v in step.meta.items() if k != VAL}
            q = moved
        for user in list(node.users):
            user.replace_all_uses_with(q if user.args[1] == 0 else scale)  # type: ignore[arg-type]
            graph.erase_node(user)
        graph.erase_node(node)
        modified = True
    return modified


def _equal_codes(wanted: TensorSpec, had: TensorSpec, dtype: Any) -> bool:
    """Quantizing decode(q) in `dtype` gives q: one grid, no scale, every value survives, and inf does not become the largest."""
    format_, info = formats.get(had.format), torch.finfo(dtype)
    if format_.nan == "none" or format_.base is not None:  # NaN is in the scale; a fractional bias gives values of 24 bits
        return False
    fits = format_.max <= info.max and format_.min_subnormal >= info.smallest_normal * info.eps
    inf_stays = had.overflow == "saturate" or wanted.overflow == "nonfinite"
    return wanted.idempotent and had.scaling == "none" and wanted.format == had.format and fits and inf_stays


def _shape_chain(node: Any) -> tuple[list[fx.Node], fx.Node | None]:
    """The shape operations from `node` up, nearest first, and what they start from."""
    chain: list[fx.Node] = []
    while _moves_elements(node):
        chain.append(node)
        node = node.args[0]
    return chain, node if isinstance(node, fx.Node) else None


def _moves_elements(node: Any) -> bool:
    """A shape operation; `view(dtype)` reads the same bytes as other numbers and is none."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in SHAPE_METHODS:
        return False
    return not any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))


def _only_anchor(node: fx.Node) -> bool:
    """Read as an anchor only, directly or through shape operations."""
    shaped = [user for user in node.users if _moves_elements(user) and user.users]
    return read_only_as_anchor(node, but=shaped) and all(_only_anchor(user) for user in shaped)


def _drop_unread(graph: fx.Graph) -> bool:
    """A dequantize that is passed on as an anchor only becomes the anchor of what was quantized.

    Where shape operations stand between, or the dtype differs, it becomes a zero of stride 0 that carries the gradient.
    """
    modified = False
    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE)):
        if not node.users or not _only_anchor(node):
            continue
        anchor, dtype = node.args[0], node.args[4]
        value = tensor(anchor)
        viewed = any(user.op == "call_method" for user in node.users)
        if viewed or value is None or value.dtype != dtype:  # the gradient must still be cast on the way back
            with graph.inserting_after(node):
                anchor = emit(graph, node, ops.anchor.default, node.args[0], dtype, value=node.meta.get(VAL))
        node.replace_all_uses_with(anchor)  # type: ignore[arg-type]
        graph.erase_node(node)
        modified = True
    return modified
