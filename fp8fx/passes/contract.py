"""The whole contract of a pass.

A pass is a function `(module: fx.GraphModule, context: Context) -> PassResult`. It changes the graph it is given (the pipeline
owns a copy of the user's), never a tensor, and it must leave

  * a graph that lints, with meta["val"], meta["module"] and meta["site"] as `fp8fx.capture.graph` describes them,
  * the same numbers: after insert_qdq every later pass keeps outputs and gradients bit for bit (eager, CPU),
  * a fixed point: run again on its own result it modifies nothing.

A rewrite that does not apply is a `Skip` with its reason, for the plan. A broken invariant raises PassError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import MODULE, SITE, VAL
from fp8fx.capture.regions import REGION
from fp8fx.recipe import Recipe
from fp8fx.spec import SiteSpec

DECISION = "decision"  # meta key: SiteDecision, on every site
# Names of the further inputs and of the output that insert_qdq adds (passes/inputs.py); the last three are keys of module.meta too.
METER, RNG, SCALES, GRAD_SCALES, AMAX = "fp8_meter", "fp8_rng", "fp8_scales", "fp8_grad_scales", "fp8_amax"
SLOTS = "fp8_slots"  # module.meta: site name of each row of the meter
SLOT = "slot"  # meta key: Slot, on a quantize node whose scaling is delayed


@dataclass(frozen=True)
class Slot:
    """One scale that is kept between steps: of the tensor that `site` reads or writes as `role`, in `format`."""

    site: str
    role: str
    format: str
    power_of_two: bool


@dataclass(frozen=True)
class SiteDecision:
    """What annotate decided for one site. `spec` is None unless `mode` is "fp8"."""

    name: str
    op: str
    mode: str  # fp8 | exempt | high_precision
    reason: str
    spec: SiteSpec | None = None
    emulate_attention: bool = False


@dataclass(frozen=True)
class Skip:
    """A rewrite that was considered and left alone."""

    rule: str
    node: str
    reason: str


@dataclass
class PassResult:
    module: fx.GraphModule
    modified: bool
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What passes may look at besides the graph.

    modules: dotted name -> class names of the MRO, for all modules of the root. complete: the graph is the whole forward.
    add_input: appends an input placeholder; the front end knows how. calibrating: measure amax only
    (fp8fx.autocast). device: type of device it runs on; device_name, capability: of that GPU, by torch. weights_inside: weights that nobody
    keeps are quantized in the graph, where it runs on kernels. eager: no compiler joins what the rewritten graph leaves apart.
    cuda_graphs: the host launches the graph as a whole, whatever is in it.
    """

    recipe: Recipe
    modules: Mapping[str, tuple[str, ...]]
    complete: bool
    add_input: Callable[[fx.Graph, str], fx.Node]
    calibrating: bool = False
    device: str = "cpu"
    device_name: str = ""
    capability: tuple[int, int] | None = None
    weights_inside: bool = False
    eager: bool = False
    cuda_graphs: bool = False

    def on(self, device: torch.device, trains: bool) -> Context:
        """The same for a graph on `device`, whose weights change between calls if it `trains`."""
        if device.type != "cuda":
            return replace(self, device=device.type)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return replace(self, device="cuda", weights_inside=trains, device_name=name, capability=capability)


Pass = Callable[[fx.GraphModule, Context], PassResult]


def decision(node: Any) -> SiteDecision | None:
    return node.meta.get(DECISION) if isinstance(node, fx.Node) else None


def emit(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, value: Any = None) -> fx.Node:
    """A new call that inherits where it came from (module, stack trace) but not what `origin` was (decision, site)."""
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in origin.meta.items() if k not in (VAL, DECISION, SITE, "example_value")}
    node.meta.setdefault(MODULE, "")
    node.meta[VAL] = value
    return node


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """Output `index` of a node, reusing the getitem if there is one."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.inserting_after(node):
        return emit(graph, node, operator.getitem, node, index)


def is_item(node: Any, of: Any, index: int) -> bool:
    """`node` is output `index` of a call to the operator `of`."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    source = node.args[0]
    return bool(node.args[1] == index) and isinstance(source, fx.Node) and source.target is of


def input_node(graph: fx.Graph, name: str) -> fx.Node | None:
    return next((n for n in graph.find_nodes(op="placeholder") if n.meta.get("extra") == name), None)


def finish(module: fx.GraphModule, modified: bool, skips: list[Skip] | None = None) -> PassResult:
    """End of every pass: drop what nobody reads, and check. The pipeline compiles the graph once, after the last pass."""
    if modified:
        _erase_dead(module.graph)
        module.graph.lint()
    return PassResult(module, modified, skips or [])


def _erase_dead(graph: fx.Graph) -> None:
    """Only fp8fx's own nodes and getitems are dropped; what the user's graph computes is not ours to judge."""
    for node in reversed(graph.nodes):
        ours = node.op == "call_function" and (is_fp8(node) or node.target in (operator.getitem, torch.unbind))
        if ours and not node.users:
            graph.erase_node(node)


def same_region(*nodes: fx.Node) -> bool:
    """All nodes belong to one checkpointed region, or to none: only those may become one node."""
    return len({node.meta.get(REGION) for node in nodes}) == 1


def is_fp8(node: Any) -> bool:
    return isinstance(node, fx.Node) and getattr(node.target, "namespace", "") == "fp8fx"
