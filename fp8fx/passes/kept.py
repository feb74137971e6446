"""`save_activation_inputs: fp8`, for *annotate* and *insert_qdq*: which outputs an activation keeps in FP8, and the graph that does so.

    act(linear(x, w1))                        ->  fp8fx.act(linear(x, w1), None, act)[0]
    act(linear(x, w1)) * linear(x, w2)        ->  fp8fx.act(linear(x, w1), linear(x, w2), act)[0]      SwiGLU, GeGLU

Every layer whose output is kept must ask for it. *annotate* asks what follows a layer, so that the plan can say it; *insert_qdq* writes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fp8fx.capture.graph import VAL, tensor
from fp8fx.passes.activations import activation_of
from fp8fx.passes.contract import SiteDecision, emit, item, same_region
from fp8fx.passes.effects import Effects

ops = torch.ops.fp8fx
MULTIPLY = (operator.mul, torch.mul, "mul")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_ACTIVATION = "no SiLU, GELU or ReLU reads its output alone"


@dataclass(frozen=True)
class Activation:
    """act(gate), or act(gate) * up: `last` is the node whose value it is."""

    name: str
    act: fx.Node
    gate: fx.Node
    up: fx.Node | None
    last: fx.Node


def activation_after(site: fx.Node, asks: Iterable[fx.Node]) -> Activation | str:
    """The activation that keeps the output of `site`, one of those that ask for it; or why there is none."""
    asking = set(asks)
    user = _only_user(site)
    if user is None:
        return NO_ACTIVATION
    if activation_of(user) is not None:
        found = _gated(user) if _factor(user) else None
        if found is None or found.up not in asking:
            found = Activation(str(activation_of(user)), user, site, None, user)
    elif _is_product(user):
        act = next((x for x in user.args if isinstance(x, fx.Node) and activation_of(x) is not None), None)
        found = None if act is None else _gated(act)
        if act is None:
            return NO_ACTIVATION
        if found is None or found.gate not in asking:
            return f"the layer before {activation_of(act)}, whose output it is multiplied by, does not keep its own"
    else:
        return NO_ACTIVATION
    return _obstacle(found) or found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_product(node: fx.Node) -> bool:
    return node.target in MULTIPLY and not node.kwargs and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _factor(act: fx.Node) -> bool:
    user = _only_user(act)
    return user is not None and _is_product(user)


def _gated(act: fx.Node) -> Activation | None:
    """act(gate) * up, where nothing else reads gate, act(gate) or up."""
    gate, product = act.args[0], _only_user(act)
    if not isinstance(gate, fx.Node) or product is None or not _is_product(product):
        return None
    up = product.args[1] if product.args[0] is act else product.args[0]
    if not isinstance(up, fx.Node) or up is act or _only_user(up) is not product or _only_user(gate) is not act:
        return None
    return Activation(str(activation_of(act)), act, gate, up, product)


def _obstacle(found: Activation) -> str:
    nodes = [node for node in (found.gate, found.up, found.act, found.last) if node is not None]
    values = [tensor(node) for node in (found.gate, found.up) if node is not None]
    if any(value is None or value.dtype not in DTYPES for value in values):
        return "its output is not bfloat16, float16 or float32"
    first, last = values[0], values[-1]  # of one layer or two; sizes may be symbols, which no set can hold
    if first.shape != last.shape or first.dtype != last.dtype:  # type: ignore[union-attr]
        return "the two layers differ in shape or dtype"
    if not same_region(*nodes):
        return "activation checkpointing begins or ends in between"
    return ""


def write_kept(graph: fx.Graph, decisions: Mapping[fx.Node, SiteDecision]) -> None:
    """Write fp8fx.act for every activation that keeps its inputs. decisions: of the FP8 sites, in order."""
    asks = [node for node, made in decisions.items() if made.spec is not None and made.spec.save_activation_inputs == "fp8"]
    effects = Effects(graph)
    for site in asks:
        found = activation_after(site, asks)
        if isinstance(found, str) or found.gate is not site:  # a gated form is written for its gate
            continue
        value = tensor(found.last)
        if value is None or not value.requires_grad or effects.mode_changes_between(found.act, found.last):
            continue
        with graph.inserting_before(found.last):
            made = emit(graph, found.last, ops.act.default, found.gate, found.up, found.name)
        y = item(graph, made, 0)
        y.meta[VAL] = found.last.meta.get(VAL)
        found.last.replace_all_uses_with(y)
        graph.erase_node(found.last)
        if found.act is not found.last:
            graph.erase_node(found.act)
