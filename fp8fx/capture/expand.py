"""Dynamo keeps `multi_head_attention_forward` as one call; its linears and products are sites, so it is written out.

The expansion is `nn.MultiheadAttention`'s own arithmetic for the common forms; a call with options it does not know stays one
call, and the plan says so.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fp8fx.capture.graph import VAL, tensor

_NAMES = [
    "query",
    "key",
    "value",
    "embed_dim_to_check",
    "num_heads",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "dropout_p",
    "out_proj_weight",
    "out_proj_bias",
    "training",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "use_separate_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "static_k",
    "static_v",
    "average_attn_weights",
    "is_causal",
]
_DEFAULTS: dict[str, Any] = {
    "training": True,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "use_separate_proj_weight": False,
    "average_attn_weights": True,
    "is_causal": False,
}


def expand_attention(module: fx.GraphModule) -> None:
    """Replace each `multi_head_attention_forward` that has a known form by the calls it consists of."""
    for node in list(module.graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)):
        args = {**_DEFAULTS, **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
        if _known(args):
            _expand(module.graph, node, args)
    module.graph.lint()


def _known(a: dict[str, Any]) -> bool:
    query = tensor(a["query"])
    refused = ("bias_k", "bias_v", "static_k", "static_v")
    packed_self = a["query"] is a["key"] is a["value"] or a["use_separate_proj_weight"]
    return query is not None and query.dim() == 3 and not a["add_zero_attn"] and all(a.get(k) is None for k in refused) and packed_self


class _Recorder:
    """Emits calls before `node`, with example values, so that expanded nodes look like captured ones."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        method = isinstance(target, str)
        with self.graph.inserting_before(self.node):
            made = self.graph.call_method(target, args, kwargs) if method else self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k not in (VAL, "example_value")}
        values = fx.map_arg((args, kwargs), lambda n: n.meta[VAL])
        mode = _fake_mode(values[0])
        with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad(), mode:
            made.meta[VAL] = getattr(values[0][0], target)(*values[0][1:], **values[1]) if method else target(*values[0], **values[1])
        return made


def _fake_mode(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    return contextlib.nullcontext()


def _expand(graph: fx.Graph, node: fx.Node, a: dict[str, Any]) -> None:
    call = _Recorder(graph, node)
    heads = a["num_heads"]
    depth = a["embed_dim_to_check"] // heads
    q, k, v = (_heads(call, x, heads, depth) for x in _project(call, a))
    mask = _mask(call, a, heads)
    dropout = a["dropout_p"] if a["training"] else 0.0
    if a["need_weights"]:
        scores = call(torch.matmul, call(torch.mul, q, math.sqrt(1.0 / depth)), call("transpose", k, -2, -1))
        scores = scores if mask is None else call(torch.add, scores, mask)
        weights = call(F.softmax, scores, dim=-1)
        weights = call(F.dropout, weights, p=dropout) if dropout else weights
        attended, shown = call(torch.matmul, weights, v), weights
        shown = call("mean", weights, dim=1) if a["average_attn_weights"] else weights
    else:
        causal = bool(a["is_causal"]) and mask is None
        attended, shown = call(F.scaled_dot_product_attention, q, k, v, mask, dropout, causal), None
    merged = call("flatten", call("permute", attended, 2, 0, 1, 3), -2)
    output = call(F.linear, merged, a["out_proj_weight"], a["out_proj_bias"])
    for user in list(node.users):  # every user is a getitem of (output, weights)
        user.replace_all_uses_with(output if user.args[1] == 0 else shown)  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(node)


def _project(call: _Recorder, a: dict[str, Any]) -> list[Any]:
    """q, k, v [length, batch, width]: one packed linear where the three read one tensor, else three."""
    if not a["use_separate_proj_weight"]:
        return list(_chunks(call, call(F.linear, a["query"], a["in_proj_weight"], a["in_proj_bias"])))
    biases = _chunks(call, a["in_proj_bias"], 0) if a["in_proj_bias"] is not None else (None, None, None)
    weights = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    return [call(F.linear, x, w, b) for x, w, b in zip((a["query"], a["key"], a["value"]), weights, biases, strict=True)]


def _chunks(call: _Recorder, x: Any, dim: int = -1) -> tuple[Any, ...]:
    value = tensor(x)
    assert value is not None
    size = value.shape[dim] // 3
    return tuple(call(torch.narrow, x, dim, i * size, size) for i in range(3))


def _heads(call: _Recorder, x: Any, heads: int, depth: int) -> fx.Node:
    """[length, batch, width] -> [batch, heads, length, depth]. Length and batch may be symbolic, so no node names them."""
    return call("permute", call("unflatten", x, -1, (heads, depth)), 1, 2, 0, 3)


def _mask(call: _Recorder, a: dict[str, Any], heads: int) -> Any:
    """One additive mask that broadcasts to [batch, heads, length, source], or None."""
    masks = []
    if a["attn_mask"] is not None and not (a["is_causal"] and not a["need_weights"] and a["key_padding_mask"] is None):
        value = tensor(a["attn_mask"])
        assert value is not None
        mask = _additive(call, a["attn_mask"], a["query"])
        masks.append(mask if value.dim() == 2 else call("unflatten", mask, 0, (-1, heads)))
    if a["key_padding_mask"] is not None:
        mask = _additive(call, a["key_padding_mask"], a["query"])
        masks.append(call("unsqueeze", call("unsqueeze", mask, 1), 1))
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else call(torch.add, masks[0], masks[1])


def _additive(call: _Recorder, mask: Any, like: Any) -> Any:
    """A boolean mask (True is left out) as 0 and -inf; a float mask as it is."""
    value, query = tensor(mask), tensor(like)
    assert value is not None
    assert query is not None
    if value.dtype != torch.bool:
        return mask
    zeros = call(torch.zeros_like, mask, dtype=query.dtype)
    return call("masked_fill", zeros, mask, float("-inf"))
