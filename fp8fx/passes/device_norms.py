"""What *lower* fuses for CUDA devices where the rewritten graph runs eagerly: norms that write FP8, and the residual before them.

cast(norm(x))                ->  norm_cast(x)         the norm's output is only ever FP8
s = x + r; cast(norm(s))     ->  norm_cast(x, r)      s is written by the same kernel, and its gradient added by the norm's

Under Inductor norms are left alone: Inductor joins them with what surrounds them, which an operator of ours would cut apart
(docs/decisions/0016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import VAL, tensor
from fp8fx.passes.contract import Skip, emit, item, same_region
from fp8fx.passes.effects import Effects
from fp8fx.passes.has_kernels import DTYPES
from fp8fx.passes.norms import ADDITIONS, Norm, norm_of
from fp8fx.passes.reads import read_only_as_anchor
from fp8fx.spec import TensorSpec

ops = torch.ops.fp8fx
CASTS = (ops.cast.default, ops.cast_current.default)
RULE = "cast(norm(x)) = norm_cast(x)"


def fuse_norms(graph: fx.Graph) -> tuple[bool, list[Skip]]:
    effects, skips, modified = Effects(graph), list[Skip](), False
    for target in CASTS:
        for cast in list(graph.find_nodes(op="call_function", target=target)):
            norm = norm_of(cast.args[0])
            if norm is None:
                continue
            reason = _obstacle(cast, norm, effects)
            if reason:
                skips.append(Skip(RULE, cast.name, reason))
            else:
                _fuse(graph, cast, norm, effects)
                modified = True
    return modified, skips


def _obstacle(cast: fx.Node, norm: Norm, effects: Effects) -> str:
    y, x, out = norm.nodes[-1], tensor(norm.x), tensor(norm.nodes[-1])
    given = [tensor(part) for part in (norm.weight, norm.bias) if part is not None]
    if TensorSpec.parse(str(cast.args[1])).granularity != "tensor":
        return "scales are not one per tensor"
    if cast.args[4] != "input":
        return "its codes are not a layer's input"
    if x is None or out is None or x.dtype not in DTYPES or x.dtype != out.dtype or any(t is None or t.dtype != x.dtype for t in given):
        return "the norm's dtypes differ"
    if not read_only_as_anchor(y, but=(cast,)):
        return "its output is also read in high precision"
    if not same_region(*norm.nodes, cast):
        return "activation checkpointing begins or ends in between"
    read = [part for part in (norm.x, norm.weight, norm.bias) if isinstance(part, fx.Node)]
    if effects.mode_changes_between(norm.nodes[0], cast) or effects.written_between(norm.nodes[0], cast, *read, y):
        return "a write in place, a grad mode or autocast stands in between"
    return ""


def _residual(cast: fx.Node, norm: Norm, effects: Effects) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors whose sum the norm reads, if one more node reads that sum, and reads it later."""
    s, x = norm.x, tensor(norm.x)
    if s.target not in ADDITIONS or s.kwargs or len(s.args) != 2 or x is None or len(s.users) != 2:
        return None  # three readers: their gradients would be added in another order
    a, b = s.args
    parts = [tensor(a), tensor(b)]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    if any(t is None or t.shape != x.shape or t.dtype != x.dtype for t in parts) or not same_region(s, cast):
        return None
    if any(user not in norm.nodes and user < cast for user in s.users):
        return None
    if effects.mode_changes_between(s, cast) or effects.written_between(s, cast, a, b, s):
        return None
    return a, b


def _fuse(graph: fx.Graph, cast: fx.Node, norm: Norm, effects: Effects) -> None:
    both = _residual(cast, norm, effects)
    x, residual = (norm.x, None) if both is None else both
    spec, rng, site = cast.args[1:4]
    known = (None, cast.args[5]) if cast.target is ops.cast_current.default else cast.args[5:7]  # scale, record
    y, s = norm.nodes[-1], norm.x
    with graph.inserting_before(cast):
        made = emit(
            graph, y, ops.norm_cast.default, x, residual, norm.weight, norm.bias, norm.kind, norm.eps, spec, rng, site, *known,
            cast.args[-1],
        )  # fmt: skip
    anchor = item(graph, made, 0)
    anchor.meta[VAL] = y.meta.get(VAL)
    for user in list(cast.users):
        user.replace_all_uses_with(item(graph, made, 2 + int(user.args[1])))  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(cast)
    y.replace_all_uses_with(anchor)
    for node in reversed(norm.nodes):
        graph.erase_node(node)
    if both is not None:
        total: Any = item(graph, made, 1)
        total.meta[VAL] = s.meta.get(VAL)
        s.replace_all_uses_with(total)
        graph.erase_node(s)
