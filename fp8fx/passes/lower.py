"""lower: hand the graph to what runs it. The only pass that names kernels.

    enters   a graph after fuse
    leaves   a graph the runtime calls; weights arrive quantized as further inputs
    holds    outputs and gradients bit for bit

        q_w, s_w, a_w = quantize(w)  ->    further inputs fp8_weight_0_q, _scale and, if it is read, _amax: made by the runtime
        nodes of a checkpointed part ->    one checkpoint call of a body that holds them

Quantized weights come from outside so that they can be kept: for all of evaluation, or until the next optimizer step where the
recipe says `weight_cache: step`. Everything else runs as the operators' registered implementations: the exact reference, and for a graph
on a CUDA device the kernels (fp8fx.ops.cuda), for which the graph is rewritten first (passes/device.py): there, a training graph
quantizes weights that nobody keeps itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp8fx.capture.graph import TENSOR_NAME
from fp8fx.capture.regions import outline_regions
from fp8fx.ops.available import no_kernels
from fp8fx.passes.contract import SLOT, Context, PassResult, Skip, Slot, finish
from fp8fx.passes.device import to_kernels
from fp8fx.passes.device_fuse import fuse_activations
from fp8fx.passes.device_norms import fuse_norms
from fp8fx.passes.device_round import round_outputs
from fp8fx.passes.effects import Effects
from fp8fx.spec import TensorSpec

ops = torch.ops.fp8fx

WEIGHTS = "fp8_weights"  # module.meta: list[WeightInput], in the order of their inputs
PARTS = ("q", "scale", "amax")  # of a quantized weight: its further inputs are called fp8_weight_<index>_<part>
_VIEWS: dict[Any, Callable[..., Tensor]] = {torch.t: torch.t, "t": Tensor.t, "transpose": Tensor.transpose}


@dataclass(frozen=True)
class WeightInput:
    """One quantized weight: the input that holds the parameter, the views applied to it, and how it is quantized."""

    placeholder: str  # name of the parameter's own input
    parameter: str
    views: tuple[tuple[Any, tuple[Any, ...]], ...]
    spec: str
    dims: tuple[int, ...]
    cache: str = "none"  # the recipe's weight_cache
    slot: Slot | None = None  # whose scale it takes; None: from the weight itself
    site: str = ""  # that reads it first

    def view(self, weight: Tensor) -> Tensor:
        for function, args in self.views:
            weight = _VIEWS[function](weight, *args)
        return weight


def lower(module: fx.GraphModule, context: Context) -> PassResult:
    weights: list[WeightInput] = list(module.meta.get(WEIGHTS, ()))
    before = len(weights)
    changed, skips = _device(module, context)
    effects = Effects(module.graph)
    for node in list(module.graph.find_nodes(op="call_function", target=ops.quantize.default)):
        found = _weight(node, effects)
        if found is None:
            continue
        placeholder, views = found
        index = len(weights)
        made = WeightInput(
            placeholder.name, placeholder.meta[TENSOR_NAME], views, str(node.args[1]), tuple(node.args[2]),  # type: ignore[arg-type]
            node.meta.get("weight_cache", "none"), node.meta.get(SLOT), str(node.args[4]),
        )  # fmt: skip
        weights.append(made)
        for output, suffix in enumerate(PARTS):
            _replace_output(module.graph, node, output, context, f"fp8_weight_{index}_{suffix}")
    module.meta[WEIGHTS] = weights
    changed |= len(weights) != before
    finished = finish(module, changed, skips)
    if outline_regions(module):  # after dead nodes are gone: a body's outputs are what is read outside of it
        return finish(module, True, skips)
    return finished


def _device(module: fx.GraphModule, context: Context) -> tuple[bool, list[Skip]]:
    """On a CUDA device: register the kernels, and write the graph for them."""
    if context.device != "cuda":
        return False, []
    if problem := no_kernels(context.device_name, context.capability):
        return False, [Skip("kernels", "", f"{problem}: the reference runs")]
    from fp8fx.ops import cuda

    cuda.register()
    changed, skips = to_kernels(module, context)
    if changed:
        finish(module, True)  # what only the other layout of a weight read is gone
    for rewrite in (round_outputs, fuse_activations, *([fuse_norms] if context.eager else [])):
        fused, more = rewrite(module.graph)
        changed, skips = changed or fused, skips + more
    return changed, skips


def _weight(node: fx.Node, effects: Effects) -> tuple[fx.Node, tuple[tuple[Any, tuple[Any, ...]], ...]] | None:
    """The parameter that is quantized and the views between, or None for an activation or a stochastic rounding."""
    if TensorSpec.parse(str(node.args[1])).stochastic:
        return None
    views = []
    seen: Any = node.args[0]
    while _is_view(seen):
        views.append((seen.target, tuple(seen.args[1:])))
        seen = seen.args[0]
    if not isinstance(seen, fx.Node) or seen.op != "placeholder" or not seen.meta.get(TENSOR_NAME):
        return None
    if effects.written_before(node, seen):  # the graph itself changes it first: a cache, a weight that is clamped
        return None
    return seen, tuple(reversed(views))


def _is_view(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.kwargs:
        return False
    return node.target in _VIEWS and all(isinstance(arg, int) for arg in node.args[1:])


def _replace_output(graph: fx.Graph, quantize: fx.Node, output: int, context: Context, name: str) -> None:
    readers = [user for user in quantize.users if user.args[1] == output]
    if not any(user.users for user in readers):
        return
    placeholder = context.add_input(graph, name)
    placeholder.meta["extra"] = placeholder.name
    for user in readers:
        user.replace_all_uses_with(placeholder)
        graph.erase_node(user)
