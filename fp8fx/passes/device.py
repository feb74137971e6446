"""The half of *lower* for CUDA devices: linear layers get their operands from kernels, in the layouts that FP8 matrix instructions want.

    q, s, a = quantize(x)          ->  q, qt, s, _ = cast_current(x, layout='both')     or q, qt = cast(x, s, record) where s is known
    linear(x, w, [q, s], ...)      ->  linear(x, w, [q, s, qt, s], ..., columns=yes)     its backward casts likewise
    weight_transpose: keep         ->  the weight's list has both layouts too, and backward casts it no more
    amax leaves as an output, and with the meter   ->   kernels leave it in records

Two further inputs hold the records (ops/casts.py): fp8_records [n, 4], a row per cast whose amax is kept (meta: the Slots it belongs to),
and fp8_grad_records [sites, 3, 4], a row per site and gradient role (meta: the sites' positions in the meter). What has no kernel stays
as it is, with the reason as a Skip.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import tensor
from fp8fx.passes.contract import AMAX, METER, SLOTS, Context, Skip, Slot, emit, input_node, item
from fp8fx.passes.has_kernels import obstacle
from fp8fx.passes.inputs import WRAPPED
from fp8fx.spec import SiteSpec, TensorSpec

ops = torch.ops.fp8fx
QUANTIZE, LINEAR = ops.quantize.default, ops.linear.default

RECORDS, GRAD_RECORDS = "fp8_records", "fp8_grad_records"  # names of the inputs, and keys of module.meta
OUTSIDE = "its codes come from outside of the graph (weight_cache, evaluation), in one layout: the other is made in backward"


def to_kernels(module: fx.GraphModule, context: Context) -> tuple[bool, list[Skip]]:
    """Rewrite every linear layer whose GEMMs and casts all have kernels."""
    writer, skips = _Writer(module, context), []
    for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
        spec = SiteSpec.parse_backward(str(node.args[11]))
        if spec.columns:
            continue
        if reason := _obstacle(node, spec):
            skips.append(Skip("kernels", str(node.args[8]), f"{reason}: the reference runs"))
        else:
            writer.linear(node, spec)
    return writer.finish(), skips + writer.skips


def _obstacle(node: fx.Node, spec: SiteSpec) -> str:
    """Why the reference must run; empty if kernels can."""
    x, w = tensor(node.args[0]), tensor(node.args[1])
    if x is None or w is None:
        return "an operand is not a tensor"
    roles = [TensorSpec.parse(str(text)) if text else None for text in node.args[9:11]]
    return obstacle(spec, roles[0], roles[1], x.dim(), (x.dtype, w.dtype))


class _Writer:
    """Rewrites one graph's linear layers; a tensor that several read is cast once, as it was quantized once."""

    def __init__(self, module: fx.GraphModule, context: Context) -> None:
        self.module, self.graph, self.context = module, module.graph, context
        self.casts: dict[fx.Node, tuple[fx.Node, Any]] = {}  # cast node -> (itself, its scale)
        self.sites: list[str] = module.meta.get(SLOTS, [])
        self.measured = self._measured()
        self.records: list[tuple[Slot, ...]] = module.meta.setdefault(RECORDS, [])
        self.rows: list[int] = module.meta.setdefault(GRAD_RECORDS, [])
        self.modified = False
        self.skips: list[Skip] = []
        self._one: fx.Node | None = None

    def _measured(self) -> list[tuple[Slot, fx.Node]]:
        """(slot, node of its amax) of the further output."""
        slots: list[Slot] = self.module.meta.get(AMAX, [])
        if not slots:
            return []
        given: Any = self.graph.output_node().args[0]
        return list(zip(slots, given[-1].args[0], strict=True))

    def linear(self, node: fx.Node, spec: SiteSpec) -> None:
        self.modified = True
        node.update_arg(11, spec.replace(columns=True).backward_text)
        x_codes: Any = list(node.args[3])  # type: ignore[arg-type]
        wanted = "both" if node.args[5] is not None else "rows"  # without a meter there is no gradient
        node.update_arg(3, self.operand(x_codes, wanted))
        weights: Any = list(node.args[4])  # type: ignore[arg-type]
        quantize = _quantize_of(weights)
        x = tensor(node.args[0])
        if _drawn_for_another(weights, node):
            node.update_arg(4, self.operand(weights, wanted))
        elif spec.weight_transpose == "keep" and node.args[5] is not None and x is not None and x.requires_grad:
            self.kept_weight(node, weights, quantize)
        else:
            node.update_arg(4, weights[:2])  # the other layout is made from the parameter in backward
            self.own_weight(quantize)
        if node.args[5] is not None:
            node.update_arg(5, self.grad_record(node.args[5]))

    def own_weight(self, quantize: fx.Node | None) -> None:
        if quantize is not None and self._is_inside(quantize):
            self.cast(quantize)

    def kept_weight(self, node: fx.Node, weights: list[Any], quantize: fx.Node | None) -> None:
        """weight_transpose: keep. Both layouts by one cast in forward."""
        if self._is_inside(quantize):
            node.update_arg(4, self.operand(weights[:2], "both"))
        else:
            node.update_arg(4, weights[:2])
            self.skips.append(Skip("weight_transpose: keep", str(node.args[8]), OUTSIDE))

    def _is_inside(self, quantize: fx.Node | None) -> bool:
        """The weight is cast in the graph (None: by a cast that stands there already), and not kept from step to step."""
        return self.context.weights_inside and (quantize is None or quantize.meta.get("weight_cache", "none") == "none")

    def operand(self, codes: list[Any], layout: str) -> list[Any]:
        """[q, scale] or [q, scale, qt, scale_t] with those of one cast."""
        quantize = _quantize_of(codes)
        if quantize is None:  # cast for another site already, or not quantized in this graph
            cast, scale = self._known(codes)
            if cast is None:
                return codes
        else:
            cast, scale = self.cast(quantize)
        q = item(self.graph, cast, 0)
        if layout == "rows" and cast.args[-1] == "rows":
            return [q, scale]
        cast.update_arg(len(cast.args) - 1, "both")
        turned = scale
        if cast.target is ops.cast_current.default and TensorSpec.parse(str(cast.args[1])).granularity != "tensor":
            turned = item(self.graph, cast, 3)
        return [q, scale, item(self.graph, cast, 1), turned]

    def _known(self, codes: list[Any]) -> tuple[Any, Any]:
        source: Any = codes[0].args[0] if codes and codes[0].target is operator.getitem else None
        found = self.casts.get(source)
        return (None, None) if found is None else found

    def cast(self, quantize: fx.Node) -> tuple[fx.Node, Any]:
        """The cast that stands for `quantize` from now on, and its scale. It makes row-major codes until a reader wants both."""
        x, text, _, rng, site, role, known = quantize.args
        scale: Any = known
        spec = TensorSpec.parse(str(text))
        record = self.record(quantize)
        with self.graph.inserting_before(quantize):
            if spec.scaling == "current":
                made = emit(self.graph, quantize, ops.cast_current.default, x, text, rng, site, role, record, "rows")
            else:
                made = emit(self.graph, quantize, ops.cast.default, x, text, rng, site, role, scale, record, "rows")
                scale = scale if scale is not None else self.one()
        made.meta["weight_cache"] = quantize.meta.get("weight_cache", "none")
        if spec.scaling == "current":
            scale = item(self.graph, made, 2)
        for user in list(quantize.users):
            user.replace_all_uses_with(item(self.graph, made, 0) if user.args[1] == 0 else scale)
            self.graph.erase_node(user)
        self.graph.erase_node(quantize)
        self.casts[made] = (made, scale)
        return made, scale

    def one(self) -> fx.Node:
        """A scale of 1, one for the graph; it is made from an input, for its device."""
        if self._one is None:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder" and tensor(node) is not None]
            weight = next((node for node in inputs if tensor(node).is_cuda), inputs[0])  # type: ignore[union-attr]
            with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
                self._one = self.graph.call_method("new_ones", (weight, ()), {"dtype": torch.float32})
        return self._one

    def record(self, quantize: fx.Node) -> fx.Node | None:
        """The record for the amax of `quantize`, if anyone keeps it; the further output loses it."""
        amax = next((user for user in quantize.users if user.args[1] == 2), None)
        slots = tuple(slot for slot, node in self.measured if node is amax)
        if amax is None or not slots:
            return None
        self.measured = [(slot, node) for slot, node in self.measured if node is not amax]
        self._write_output()
        self.records.append(slots)
        return self._row(RECORDS, len(self.records) - 1)

    def grad_record(self, meter_row: Any) -> fx.Node:
        """float32 [3, RECORD] of the site with this row of the meter."""
        self.rows.append(int(meter_row.args[1]))
        return self._row(GRAD_RECORDS, len(self.rows) - 1)

    def _row(self, name: str, index: int) -> fx.Node:
        unbound = next(iter(self._input(name).users))
        return item(self.graph, unbound, index)

    def _input(self, name: str) -> fx.Node:
        found = input_node(self.graph, name)
        if found is None:
            found = self.context.add_input(self.graph, name)
            found.meta["extra"] = name
            with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
                emit(self.graph, found, torch.unbind, found)
        return found

    def _write_output(self) -> None:
        """The further output with what is still measured there; without any, the graph's own output alone."""
        output = self.graph.output_node()
        given: Any = output.args[0]
        own, stacked = given[:-1], given[-1]
        self.module.meta[AMAX] = [slot for slot, _ in self.measured]
        if self.measured:
            stacked.update_arg(0, [node for _, node in self.measured])
            return
        output.args = (own[0] if self.module.meta.get(WRAPPED) else own,)
        self.module.meta[WRAPPED] = False
        self.graph.erase_node(stacked)

    def finish(self) -> bool:
        """Rows of the meter that nobody reads go, and with the last of them the meter."""
        meter = input_node(self.graph, METER)
        if meter is not None and self.modified:
            _erase_unread(self.graph, meter)
        return self.modified


def _erase_unread(graph: fx.Graph, placeholder: fx.Node) -> None:
    for unbound in list(placeholder.users):
        for row in list(unbound.users):
            if not row.users:
                graph.erase_node(row)
        if not unbound.users:
            graph.erase_node(unbound)
    if not placeholder.users:
        graph.erase_node(placeholder)


def _drawn_for_another(weights: list[Any], node: fx.Node) -> bool:
    """A weight that layers share is rounded stochastically, with the bits of its first reader: another could not make the codes again."""
    source: Any = weights[0].args[0] if weights and weights[0].target is operator.getitem else None
    if source is None or source.target not in (QUANTIZE, ops.cast.default, ops.cast_current.default):
        return False
    site = source.args[4] if source.target is QUANTIZE else source.args[3]
    return TensorSpec.parse(str(source.args[1])).stochastic and site != node.args[8]


def _quantize_of(codes: list[Any]) -> fx.Node | None:
    """The quantize node that a pair [q, scale] comes from."""
    source = codes[0].args[0] if codes and codes[0].target is operator.getitem else None
    return source if isinstance(source, fx.Node) and source.target is QUANTIZE else None
