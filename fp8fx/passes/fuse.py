"""fuse: producers that quantize what they compute, and compound operators with one autograd formula.

enters   a graph after cancel
leaves   the same numbers from fewer kernels and with less memory
holds    outputs and gradients bit for bit

    linear(act(linear(x, w1)), w2)     ->  mlp(x, w1, w2)            hands FP8 gradients from one GEMM to the next
    quantize(layer_norm(x))            ->  layer_norm_quantize(x)    the normalized tensor is never written
    quantize(linear(x, w))             ->  linear_quantize(x, w)     the epilogue rounds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fp8fx.capture.graph import VAL, tensor
from fp8fx.passes.activations import activation_of
from fp8fx.passes.contract import Context, PassResult, Skip, emit, finish, is_item, item, same_region
from fp8fx.passes.effects import Effects
from fp8fx.passes.reads import read_only_as_anchor, reads_values
from fp8fx.spec import GEMMS, SiteSpec, TensorSpec

ops = torch.ops.fp8fx
QUANTIZE, LINEAR = ops.quantize.default, ops.linear.default

Rule = Callable[[fx.Graph, fx.Node, Effects], "str | None"]  # None: rewritten; "": no such pattern; else the reason it does not apply


def fuse(module: fx.GraphModule, context: Context) -> PassResult:
    skips: list[Skip] = []
    modified = False
    if context.device == "cuda":
        return finish(module, False)  # lower fuses what there are kernels for
    effects = Effects(module.graph)
    for name, target, rule in RULES:
        for node in list(module.graph.find_nodes(op="call_function", target=target)):
            reason = rule(module.graph, node, effects)
            modified |= reason is None
            if reason:
                skips.append(Skip(name, node.name, reason))
    return finish(module, modified, skips)


def _mlp(graph: fx.Graph, node: fx.Node, effects: Effects) -> str | None:
    """`linear(act(linear(x, w1)), w2) = mlp(x, w1, w2)`; `node` is the second linear."""
    act = node.args[0]
    name = activation_of(act)
    first = act.args[0] if name is not None and isinstance(act, fx.Node) else None
    if not isinstance(first, fx.Node) or first.target is not LINEAR:
        return ""
    assert isinstance(act, fx.Node)
    if not same_region(first, act, node):
        return "activation checkpointing begins or ends in between"
    quantized = list(node.args[3])  # type: ignore[arg-type]
    if len(quantized) != 2 or not is_item(quantized[0], QUANTIZE, 0) or quantized[0].args[0].args[0] is not act:
        return "the second linear does not quantize the activation itself"
    quantize = quantized[0].args[0]
    if set(act.users) - {quantize, node} or reads_values(node, act):
        return "the activation's output is read elsewhere"
    if any(user.args[1] != 2 for user in set(quantize.users) - set(quantized)) or any(set(user.users) - {node} for user in quantized):
        return "the quantized activation is read elsewhere"
    if set(first.users) != {act}:
        return "the first linear's output is read elsewhere"
    if problem := _mlp_obstacle(first, node, quantize) or _cannot_move(effects, first, node, first.args[2], first):
        return problem
    x, w1, b1, input, weight1, row1, scales1, rng, site1, in1, wt1, back1, dtype1 = first.args
    _, w2, b2, _, weight2, row2, scales2, _, site2, in2, wt2, back2, dtype2 = node.args
    with graph.inserting_before(node):
        made = emit(
            graph, node, ops.mlp.default, x, w1, b1, w2, b2, input, weight1, weight2, row1, row2, scales1, scales2, quantize.args[6],
            rng, name, site1, in1, wt1, back1, dtype1, site2, in2, wt2, back2, dtype2,
        )  # fmt: skip
    y = item(graph, made, 0)
    y.meta[VAL] = node.meta.get(VAL)
    node.replace_all_uses_with(y)
    amax = [user for user in quantize.users if user not in quantized]
    for user in amax:
        user.replace_all_uses_with(item(graph, made, 4))
    for dead in (node, *quantized, *amax, quantize, act, first):
        graph.erase_node(dead)
    return None


def _mlp_obstacle(first: fx.Node, second: fx.Node, quantize: fx.Node) -> str:
    for linear in (first, second):
        spec = SiteSpec.parse_backward(str(linear.args[11]))
        if set(spec.gemms) != set(GEMMS) or spec.save_for_backward != "fp8":
            return f"{linear.args[8]}: not all of its GEMMs read codes"
        if len(linear.args[4]) != 2 or len(linear.args[3]) != 2:  # type: ignore[arg-type]
            return f"{linear.args[8]}: an operand stays in high precision, or needs two quantizations"
    if (quantize.args[4], quantize.args[5]) != (second.args[8], "input") and TensorSpec.parse(str(quantize.args[1])).stochastic:
        return "the random bits belong to another site"
    return ""


def _cannot_move(effects: Effects, node: fx.Node, down_to: fx.Node, *read: Any) -> str:
    """Why the work of `node`, which reads `read`, cannot be done at `down_to` instead; or nothing."""
    if effects.mode_changes_between(node, down_to):
        return "grad mode or autocast changes in between"
    return "a tensor it reads is written in place in between" if effects.written_between(node, down_to, *read) else ""


def _layer_norm(graph: fx.Graph, node: fx.Node, effects: Effects) -> str | None:
    """`quantize(layer_norm(x)) = layer_norm_quantize(x)`."""
    readers = [user for user in node.users if user.target is QUANTIZE]
    if not readers:
        return ""
    if len(readers) > 1:
        return "its output is quantized in more than one way"
    (quantize,) = readers
    if quantize.args[0] is not node or not read_only_as_anchor(node, but=(quantize,)):
        return "its output is also read in high precision"
    if not same_region(node, quantize):
        return "activation checkpointing begins or ends in between"
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    a: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5} | dict(zip(names, node.args, strict=False)) | node.kwargs
    x, out = tensor(a["input"]), tensor(node)
    if x is None or out is None or x.dtype != out.dtype:
        return "autocast changes its dtype"
    if problem := _cannot_move(effects, node, quantize, a["input"], a["weight"], a["bias"]):
        return problem
    _, spec, dims, rng, site, role, scale = quantize.args
    with graph.inserting_before(quantize):
        made = emit(
            graph, node, ops.layer_norm_quantize.default, a["input"], a["weight"], a["bias"], list(a["normalized_shape"]), a["eps"],
            spec, dims, rng, site, role, scale,
        )  # fmt: skip
    _replace_producer(graph, node, quantize, made)
    return None


def _linear_quantize(graph: fx.Graph, node: fx.Node, effects: Effects) -> str | None:
    """`quantize(linear(x, w)) = linear_quantize(x, w)`."""
    readers = [user for user in node.users if user.target is QUANTIZE]
    if len(readers) != 1 or node.args[12] is not torch.float32:
        return ""
    (quantize,) = readers
    if not read_only_as_anchor(node, but=(quantize,)):
        return "its output is also read in high precision"
    if not same_region(node, quantize):
        return "activation checkpointing begins or ends in between"
    if (quantize.args[4], quantize.args[5]) != (node.args[8], "output"):
        return "the quantize belongs to the next site"
    if problem := _cannot_move(effects, node, quantize, node.args[2], node):
        return problem
    with graph.inserting_before(quantize):
        made = emit(graph, node, ops.linear_quantize.default, *node.args[:12], quantize.args[1], quantize.args[6], node.args[12])
    _replace_producer(graph, node, quantize, made)
    return None


def _replace_producer(graph: fx.Graph, producer: fx.Node, quantize: fx.Node, made: fx.Node) -> None:
    """`made` gives (anchor, q, scale, amax, ...): the anchor stands for the producer, the rest for the quantize's outputs."""
    anchor = item(graph, made, 0)
    anchor.meta[VAL] = producer.meta.get(VAL)
    for user in list(quantize.users):
        user.replace_all_uses_with(item(graph, made, 1 + int(user.args[1])))  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(quantize)
    # `made` stands where the quantize stood; anything that took the producer as an anchor earlier must still come after it
    producer.replace_all_uses_with(anchor)
    graph.erase_node(producer)


# In this order: the widest pattern first.
RULES: tuple[tuple[str, Any, Rule], ...] = (
    ("linear(act(linear(x, w1)), w2) = mlp(x, w1, w2)", LINEAR, _mlp),
    ("quantize(layer_norm(x)) = layer_norm_quantize(x)", F.layer_norm, _layer_norm),
    ("quantize(linear(x, w)) = linear_quantize(x, w)", LINEAR, _linear_quantize),
)
