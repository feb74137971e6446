"""For *insert_qdq* and *lower*: the further inputs and the one further output of a graph, which carry the state, so that it holds none.

    fp8_meter        float32 [sites, 5]   its "gradient" is what the sites' backwards measured (ops.quantize.STATISTICS)
    fp8_rng          int64 [3]            seed, step, call: where something is rounded stochastically
    fp8_scales       float32 [n]          scales of delayed forward roles, one per Slot of meta["fp8_scales"]
    fp8_grad_scales  float32 [sites, 3]   scales of delayed gradient roles, rows as in the meter: meta["fp8_grad_scales"]
    output, last     float32 [m]          amax of delayed forward roles, one per Slot of meta["fp8_amax"]

The runtime gives the inputs at every call, and takes the output away before the model sees it (fp8fx.graph_call).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fp8fx.capture.regions import REGION
from fp8fx.ops.quantize import GRADIENTS
from fp8fx.passes.contract import AMAX, GRAD_SCALES, METER, RNG, SCALES, SLOTS, Context, SiteDecision, Slot, emit, input_node, item
from fp8fx.spec import TensorSpec

WRAPPED = "fp8_wrapped"  # module.meta: the graph's own output was no tuple, and became the first item of one


def slot_of(made: SiteDecision, role: str, spec: TensorSpec) -> Slot:
    """The record of one role of a site. A tied weight is one name with two operations, whose gradients differ: the lookup has its own."""
    site = f"{made.name}.embedding" if made.op == "embedding" else made.name
    return Slot(site, role, spec.format, spec.power_of_two)


class FurtherInputs:
    """Makes each of them once, when it is first asked for. `finish` writes the further output."""

    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self.module, self.graph, self.context = module, module.graph, context
        self.scale_items: dict[Slot, fx.Node] = {}
        self.measured: list[tuple[Slot, fx.Node]] = []
        self.rows: dict[fx.Node, fx.Node] = {}
        self.scale_rows: dict[fx.Node, fx.Node] = {}

    def _input(self, name: str) -> fx.Node:
        node = input_node(self.graph, name) or self.context.add_input(self.graph, name)
        node.meta["extra"] = name
        return node

    def _unbound(self, name: str) -> fx.Node:
        """An input split along its first dimension, before everything else."""
        node = self._input(name)
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            return emit(self.graph, node, torch.unbind, node)

    def rng(self) -> fx.Node:
        return self._input(RNG)

    def add_rows(self, sites: list[tuple[fx.Node, SiteDecision]]) -> None:
        """One row of the meter, and one of gradient scales where any is delayed, for each of `sites`."""
        self.module.meta[SLOTS] = [made.name for _, made in sites]
        if not sites:
            return
        self.rows = self._rows(METER, sites)
        slots = [gradient_slots(made) for _, made in sites]
        if any(any(row) for row in slots):
            self.module.meta[GRAD_SCALES] = slots
            self.scale_rows = self._rows(GRAD_SCALES, sites)

    def _rows(self, name: str, sites: list[tuple[fx.Node, SiteDecision]]) -> dict[fx.Node, fx.Node]:
        unbound = self._unbound(name)
        with self.graph.inserting_after(unbound):
            return {node: emit(self.graph, unbound, operator.getitem, unbound, i) for i, (node, _) in reversed(list(enumerate(sites)))}

    def scale(self, slot: Slot) -> fx.Node:
        """The scale of `slot`."""
        if slot not in self.scale_items:
            slots: list[Slot] = self.module.meta.setdefault(SCALES, [])
            unbound = self._unbound(SCALES) if not slots else next(iter(self._input(SCALES).users))
            with self.graph.inserting_after(unbound):
                self.scale_items[slot] = emit(self.graph, unbound, operator.getitem, unbound, len(slots))
            slots.append(slot)
        return self.scale_items[slot]

    def measure(self, slot: Slot, quantize: fx.Node) -> None:
        """The amax of this quantize node is of `slot`."""
        self.measured.append((slot, item(self.graph, quantize, 2)))

    def finish(self) -> None:
        if not self.measured:
            return
        self.module.meta[AMAX] = [slot for slot, _ in self.measured]
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            stacked = emit(self.graph, output, torch.stack, [node for _, node in self.measured])
        stacked.meta.pop(REGION, None)
        given: Any = output.args[0]
        self.module.meta[WRAPPED] = not isinstance(given, (tuple, list))
        output.args = ((given, stacked) if self.module.meta[WRAPPED] else (*given, stacked),)


def gradient_slots(made: SiteDecision) -> tuple[Slot | None, ...]:
    """A Slot for each of GRADIENTS whose scaling is delayed."""
    roles = [(role, getattr(made.spec, role)) for role in GRADIENTS]
    return tuple(slot_of(made, role, spec) if spec is not None and spec.scaling == "delayed" else None for role, spec in roles)
