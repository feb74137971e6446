"""What *lower* does for CUDA devices with outputs that a role rounds without a scale: the product's own kernel rounds them.

y = linear(x, w); q = quantize(y); dequantize(y, q)    ->  linear(x, w, output=spec)             the values, in the model's dtype
y = linear(x, w); q = cast(y); linear(y, [q, ...])     ->  cast(linear(x, w, output=spec))      the cast finds them on the grid

The fp32 sums are never written, and the gradient is not widened to fp32 on its way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import VAL
from fp8fx.ops.inductor import FORMATS
from fp8fx.passes.contract import Skip, same_region
from fp8fx.passes.has_kernels import DTYPES, ROUNDINGS
from fp8fx.passes.reads import read_only_as_anchor
from fp8fx.spec import SiteSpec, TensorSpec

ops = torch.ops.fp8fx
LINEAR, DEQUANTIZE, ANCHOR = ops.linear.default, ops.dequantize.default, ops.anchor.default
QUANTIZE, CAST = ops.quantize.default, ops.cast.default
PLACES: dict[Any, tuple[int, int, int]] = {QUANTIZE: (3, 4, 5), CAST: (2, 3, 4)}  # of rng, site and role among their arguments
RULE = "quantize(linear(x, w)) = linear(x, w, output)"


def round_outputs(graph: fx.Graph) -> tuple[bool, list[Skip]]:
    """Rewrite every linear layer that runs on kernels and whose output is rounded without a scale."""
    skips, modified = list[Skip](), False
    for node in list(graph.find_nodes(op="call_function", target=LINEAR)):
        reason = _round(graph, node)
        modified |= reason is None
        if reason:
            skips.append(Skip(RULE, str(node.args[8]), reason))
    return modified, skips


def _round(graph: fx.Graph, node: fx.Node) -> str | None:
    """None: rewritten; "": no such pattern; else why it does not apply."""
    spec = SiteSpec.parse_backward(str(node.args[11]))
    rounding = [user for user in node.users if _is_rounding(user, node)]
    if not spec.columns or spec.output is not None or len(rounding) != 1:
        return ""
    (quantize,) = rounding
    output = TensorSpec.parse(str(quantize.args[1]))
    if output.scaling != "none" or output.format not in FORMATS or output.rounding not in ROUNDINGS:
        return "its output has a scale, or is rounded as no kernel does"
    if not read_only_as_anchor(node, but=(quantize,)) or any(user.args[1] == 2 for user in quantize.users):
        return "its output is also read in high precision, or measured"
    others = [user for user in node.users if user is not quantize]
    dtypes = {_dtype(user) for user in others if user.target in (DEQUANTIZE, ANCHOR)} or {torch.float32}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES) or not same_region(node, quantize):
        return "its readers differ in dtype, or in their checkpointed region"
    (dtype,) = dtypes
    node.update_arg(12, dtype)
    node.update_arg(11, spec.replace(output=output).backward_text)
    for user in others:
        if user.target is DEQUANTIZE:
            node.meta[VAL] = user.meta.get(VAL)
            user.replace_all_uses_with(node)
            graph.erase_node(user)
    for code in list(quantize.users):
        if not code.users:
            graph.erase_node(code)
    if not quantize.users:
        graph.erase_node(quantize)
        return None
    rng, _, _ = PLACES[quantize.target]
    quantize.update_arg(1, TensorSpec(format=output.format, scaling="none", overflow=output.overflow).text)  # nothing is left to round
    quantize.update_arg(rng, None)
    return None


def _is_rounding(user: fx.Node, node: fx.Node) -> bool:
    """`user` makes the codes of the output that `node`'s own role `output` asks for."""
    places = PLACES.get(user.target)
    if places is None or user.args[0] is not node:
        return False
    _, site, role = places
    return (user.args[site], user.args[role]) == (node.args[8], "output")


def _dtype(user: fx.Node) -> Any:
    return user.args[4] if user.target is DEQUANTIZE else user.args[1]
