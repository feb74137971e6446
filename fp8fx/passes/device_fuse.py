"""What *lower* fuses for CUDA devices, after the linear layers are written for kernels: an activation between two of them.

cast(act(linear(x, w1)))                    ->  act_linear(x, w1)          its output is only ever FP8, and so is its gradient
cast(act(linear(x, w1)) * linear(x, w2))    ->  act_linear(x, w1, w2)      SwiGLU, GeGLU
cast(fp8fx.act(linear, linear)[0])          ->  the same, keeping the linear layers' outputs in FP8
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import VAL, tensor
from fp8fx.passes.activations import activation_of
from fp8fx.passes.contract import Skip, emit, is_item, item, same_region
from fp8fx.passes.effects import Effects
from fp8fx.passes.reads import read_only_as_anchor
from fp8fx.spec import SiteSpec, TensorSpec

ops = torch.ops.fp8fx
LINEAR = ops.linear.default
CASTS = (ops.cast.default, ops.cast_current.default)
MULTIPLY = (operator.mul, torch.mul, "mul")
RULE = "cast(act(linear(x, w1)) * linear(x, w2)) = act_linear(x, w1, w2)"


def fuse_activations(graph: fx.Graph) -> tuple[bool, list[Skip]]:
    effects, skips, modified = Effects(graph), list[Skip](), False
    for target in CASTS:
        for cast in list(graph.find_nodes(op="call_function", target=target)):
            reason = _fuse(graph, cast, effects)
            modified |= reason is None
            if reason:
                skips.append(Skip(RULE, cast.name, reason))
    return modified, skips


def _fuse(graph: fx.Graph, cast: fx.Node, effects: Effects) -> str | None:
    """None: rewritten; "": no such pattern; else why it does not apply."""
    a: Any = cast.args[0]
    keeps = is_item(a, ops.act.default, 0)
    if keeps:
        act = a.args[0]
        gate, up, name = act.args
    else:
        act, up = _parts(a)
        name = activation_of(act)
        gate = act.args[0] if name is not None and isinstance(act, fx.Node) else None
    if not isinstance(gate, fx.Node) or gate.target is not LINEAR or (up is not None and up.target is not LINEAR):
        return ""
    if reason := _obstacle(cast, a, act, gate, up, effects):
        return reason
    made = _emit(graph, cast, name, gate, up, keeps)
    anchor = item(graph, made, 0)
    anchor.meta[VAL] = a.meta.get(VAL)
    for user in list(cast.users):
        user.replace_all_uses_with(item(graph, made, 1 + int(user.args[1])))  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(cast)
    a.replace_all_uses_with(anchor)
    for dead in dict.fromkeys(node for node in (a, act, gate, up) if node is not None):
        graph.erase_node(dead)
    return None


def _parts(a: Any) -> tuple[Any, fx.Node | None]:
    """(act(h), u) of act(h) * u, in either order; (act(h), None) of act(h) alone."""
    if not isinstance(a, fx.Node) or a.target not in MULTIPLY or a.kwargs or len(a.args) != 2:
        return a, None
    left, right = a.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return a, None
    return (left, right) if activation_of(left) is not None else (right, left)


def _obstacle(cast: fx.Node, a: fx.Node, act: fx.Node, gate: fx.Node, up: fx.Node | None, effects: Effects) -> str:
    linears = [gate] if up is None else [gate, up]
    if any(TensorSpec.parse(str(text)).granularity != "tensor" for text in (cast.args[1], *(linear.args[9] for linear in linears))):
        return "scales are not one per tensor"
    specs = [SiteSpec.parse_backward(str(linear.args[11])) for linear in linears]
    if not all(spec.columns for spec in specs):
        return "a linear layer before it does not run on kernels"
    gradients = {None if spec.grad_output is None else spec.grad_output.text for spec in specs}
    if len(gradients) > 1 or any(TensorSpec.parse(str(text)).granularity != "tensor" for text in gradients):
        return "the gradients of its linear layers are quantized in different ways"
    outputs = [tensor(linear) for linear in linears]
    if any(value is None or value.dtype != gate.args[12] for value in outputs) or any(
        linear.args[12] != gate.args[12] for linear in linears
    ):
        return "its linear layers differ in their output's dtype"
    if len({linear.args[5] is None for linear in linears}) > 1:
        return "one of its linear layers has a gradient, and the other none"
    if any(value is None or value.shape != outputs[0].shape for value in outputs):  # type: ignore[union-attr]
        return "its linear layers differ in width"
    if up is not None and (gate.args[0] is not up.args[0] or list(gate.args[3]) != list(up.args[3])):  # type: ignore[arg-type]
        return "its linear layers read different inputs"
    up_reader = act if act.target is ops.act.default else a
    if set(gate.users) != {act} or (act is not a and set(act.users) != {a}) or (up is not None and set(up.users) != {up_reader}):
        return "a tensor in between is read elsewhere"
    if not read_only_as_anchor(a, but=(cast,)):
        return "the activation's output is also read in high precision"
    if not same_region(*linears, act, a, cast):
        return "activation checkpointing begins or ends in between"
    read = [linear.args[2] for linear in linears]
    if any(effects.mode_changes_between(node, cast) or effects.written_between(node, cast, *read, node) for node in linears):
        return "a write in place, a grad mode or autocast stands in between"
    return ""


def _emit(graph: fx.Graph, cast: fx.Node, name: str | None, gate: fx.Node, up: fx.Node | None, keeps: bool) -> fx.Node:
    x, w1, b1, input, weight1, record1, scales1, rng, site1, in_spec, w1_spec, back1, dtype = gate.args
    w2 = b2 = record2 = scales2 = None
    weight2: Any = []
    site2 = w2_spec = ""
    back2: Any = back1
    if up is not None:
        _, w2, b2, _, weight2, record2, scales2, _, site2, _, w2_spec, back2, _ = up.args  # type: ignore[assignment]
    if keeps:
        back1, back2 = (SiteSpec.parse_backward(str(text)).replace(save_activation_inputs="fp8").backward_text for text in (back1, back2))
    spec, own_rng, site = cast.args[1], cast.args[2], cast.args[3]
    current = cast.target is ops.cast_current.default
    scale, record = (None, cast.args[5]) if current else (cast.args[5], cast.args[6])
    with graph.inserting_before(cast):
        return emit(
            graph, cast, ops.act_linear.default, x, w1, w2, b1, b2, input, weight1, weight2, record1, record2, scales1, scales2, scale,
            record, rng if own_rng is None else own_rng, name, site1, site2, in_spec, w1_spec, w2_spec, back1, back2, spec, site,
            cast.args[-1], dtype,
        )  # fmt: skip
