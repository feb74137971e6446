"""insert_qdq: make the numbers visible. Every site with an FP8 decision becomes quantize nodes and an fp8fx operator.

    enters   an annotated graph
    leaves   quantize(x), quantize(w), fp8fx.linear(x, w, b, [q_x, s_x], [q_w, s_w], ...); dequantize where a role rounds the output;
             fp8fx.act in place of activations that keep their inputs in FP8 (passes/kept.py)
    holds    no site is left undone; x and w stay as the anchors that carry the gradient

        y = linear(x, w, b)    ->    q_x, s_x, _ = quantize(x, 'e4m3fn/...', [-1])
                                     q_w, s_w, _ = quantize(w, 'e4m3fn/...', [-1])
                                     y = fp8fx.linear(x, w, b, [q_x, s_x], [q_w, s_w], meter, rng, 'fc1', ...)

Further inputs bring the state in (the meter, the random stream, delayed scales), and a further output takes amax out: passes/inputs.py.
They come from the runtime at every call: the graph holds no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.capture.graph import VAL, tensor
from fp8fx.capture.naming import weight_source
from fp8fx.capture.sites import CONVOLUTIONS, SiteCall, read_site
from fp8fx.errors import PassError
from fp8fx.ops.operands import needs_two, turned
from fp8fx.passes.contract import SLOT, Context, PassResult, SiteDecision, decision, emit, finish, item
from fp8fx.passes.inputs import FurtherInputs, slot_of
from fp8fx.passes.kept import write_kept
from fp8fx.spec import GEMMS, ROLES, SiteSpec, TensorSpec

ops = torch.ops.fp8fx
Row = tuple[fx.Node | None, fx.Node | None]  # a site's rows of the meter and of the gradient scales


def insert_qdq(module: fx.GraphModule, context: Context) -> PassResult:
    sites = [(node, made) for node in module.graph.nodes if (made := decision(node)) is not None and made.mode == "fp8"]
    if not sites:
        return finish(module, False)
    if not context.calibrating:
        write_kept(module.graph, dict(sites))
    writer = _Writer(module, context, sites)
    for node, made in sites:
        call = read_site(node)
        if call is None or made.spec is None:
            raise PassError(f"insert_qdq: {made.name}: the node {node.format_node()} has an FP8 decision but is not a site")
        with module.graph.inserting_before(node):
            result = writer.rewrite(call, made, made.spec.replace(save_activation_inputs="model"))  # written already
        result.meta[VAL] = node.meta.get(VAL)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
    writer.inputs.finish()
    return finish(module, True)


def _metered(node: fx.Node, made: SiteDecision) -> bool:
    """Sites that have a gradient have statistics; a meter on any other would make its output require one."""
    value = tensor(node)
    return made.op != "attention" and value is not None and value.requires_grad


def _draws(spec: SiteSpec) -> bool:
    """Something at the site is rounded stochastically: a role, or its products."""
    roles = [role for name in ROLES if (role := getattr(spec, name)) is not None]
    return any(role.stochastic for role in roles) or (spec.arithmetic is not None and Arithmetic.parse(spec.arithmetic).stochastic)


class _Writer:
    """Writes one graph's sites. `self.first` names each quantized tensor after the first site that reads it."""

    def __init__(self, module: fx.GraphModule, context: Context, sites: list[tuple[fx.Node, SiteDecision]]) -> None:
        self.graph = module.graph
        self.first: dict[tuple[Any, ...], tuple[str, str, SiteDecision]] = {}
        self.matrices: dict[fx.Node, fx.Node] = {}  # a tensor of tokens -> its flattened form
        self.inputs = FurtherInputs(module, context)
        self.rng = self.inputs.rng() if any(_draws(made.spec) for _, made in sites if made.spec is not None) else None
        self.inputs.add_rows([(node, made) for node, made in sites if _metered(node, made)])

    def rewrite(self, call: SiteCall, made: SiteDecision, spec: SiteSpec) -> fx.Node:
        """The node that replaces the site: of the site's own shape and dtype."""
        value = tensor(call.node)
        dtype = value.dtype if value is not None else torch.float32
        if made.emulate_attention:
            return self.attention(call, made, spec, dtype)
        rounds = spec.output is not None and not spec.calibrating
        accumulated = torch.float32 if rounds else dtype
        y = self.product(call, made, spec, accumulated)
        if spec.output is not None:
            y = self.rounded_output(call, made, spec.output, y, dtype)
        if call.add is not None:
            other, beta, alpha = call.add
            y = y if alpha == 1 else self.emit(call, torch.mul, y, alpha)
            y = self.emit(call, torch.add, y, self.addend(call, other, beta, dtype))
        return y

    def addend(self, call: SiteCall, other: Any, beta: float, dtype: torch.dtype) -> Any:
        """beta * other in the site's own dtype. With beta = 0 torch ignores the values of `other`, NaN too: its anchor stands for it."""
        value = tensor(other)
        if beta == 0:
            other = self.emit(call, ops.anchor.default, other, dtype)
        elif value is not None and value.dtype != dtype:
            other = self.emit(call, torch.Tensor.to, other, dtype)
        return other if beta == 1 else self.emit(call, torch.mul, other, beta)

    def emit(self, call: SiteCall, target: Any, *args: Any) -> fx.Node:
        return emit(self.graph, call.node, target, *args)

    def quantize(self, call: SiteCall, x: Any, spec: TensorSpec | None, dims: list[int], site: str, role: str) -> list[fx.Node]:
        """[q, scale] of `x`, or [] if it stays in high precision. While calibrating, only the amax of delayed roles is read."""
        made = decision(call.node)
        assert made is not None
        assert made.spec is not None
        if spec is None or (made.spec.calibrating and spec.scaling != "delayed"):
            return []
        dims = dims if spec.granularity == "row" else [-1]  # only scales per row depend on the contraction
        producer, name, first = self.first.setdefault((x, spec.text, tuple(dims)), (site, role, made))
        rng = self.rng if spec.stochastic else None
        slot, own = (slot_of(m, "weight" if r == "other" else r, spec) for m, r in ((first, name), (made, role)))
        delayed = spec.scaling == "delayed"
        scale = self.inputs.scale(slot) if delayed else None
        node = self.emit(call, ops.quantize.default, x, spec.text, dims, rng, producer, name, scale)
        node.meta["weight_cache"] = made.spec.weight_cache
        if delayed:
            node.meta[SLOT] = slot
            for record in dict.fromkeys((slot, own)):  # a reader that is not the first keeps a record too: it may be the first elsewhere
                self.inputs.measure(record, node)
        return [] if made.spec.calibrating else [item(self.graph, node, 0), item(self.graph, node, 1)]

    def pair(
        self, call: SiteCall, x: Any, spec: TensorSpec | None, dims: tuple[list[int], list[int]], site: str, role: str
    ) -> list[fx.Node]:
        """The operand's list: one quantization, or two where the two GEMMs that read it need different scales."""
        codes = self.quantize(call, x, spec, dims[0], site, role)
        value = tensor(x)
        tokens = call.op == "linear" and role == "input" and value is not None and value.dim() > 2
        blocks_of_tokens = tokens and spec is not None and not isinstance(spec.granularity, str)
        if spec is None or not (needs_two(spec) or blocks_of_tokens):
            return codes
        if tokens:
            x = self.flattened(call, x)
        return codes + self.quantize(call, x, turned(spec), dims[1], site, role)

    def flattened(self, call: SiteCall, x: fx.Node) -> fx.Node:
        """[..., K] as [M, K]: the tokens that grad_weight sums over are one dimension."""
        if x not in self.matrices:
            self.matrices[x] = self.emit(call, torch.flatten, x, 0, -2)
        return self.matrices[x]

    def product(self, call: SiteCall, made: SiteDecision, spec: SiteSpec, dtype: torch.dtype) -> fx.Node:
        row = (self.inputs.rows.get(call.node), self.inputs.scale_rows.get(call.node))
        texts = [s.text if s is not None else "" for s in (spec.input, spec.weight)]
        tail = (made.name, *texts, spec.backward_text, dtype)
        if call.op == "embedding":
            weight = self.quantize(call, call.w, spec.weight, [-1], made.name, "weight")
            padding = self.padding_row(call)
            frequency = bool(call.options["scale_grad_by_freq"])
            site = (made.name, texts[1], spec.backward_text, dtype)
            return self.emit(call, ops.embedding.default, call.x, call.w, weight, *row, self.rng, padding, frequency, *site)
        if call.op in CONVOLUTIONS:
            return self.convolution(call, made, spec, row, tail)
        if call.op == "linear":
            w = self.emit(call, torch.t, call.w) if call.transposed_weight else call.w
            left = self.pair(call, call.x, spec.input, ([-1], [0]), made.name, "input")
            right = self.pair(call, w, spec.weight, ([-1], [0]), made.name, "weight")
            return self.emit(call, ops.linear.default, call.x, w, call.bias, left, right, *row, self.rng, *tail)
        if call.op == "grouped_mm":
            left = self.quantize(call, call.x, spec.input, [-1], made.name, "input")
            right = self.quantize(call, call.w, spec.weight, [-1], made.name, "weight")
            return self.emit(call, ops.grouped_mm.default, call.x, call.w, call.options["offs"], left, right, *row, self.rng, *tail)
        return self.matmul(call, made, spec, row, dtype)

    def matmul(self, call: SiteCall, made: SiteDecision, spec: SiteSpec, row: Row, dtype: torch.dtype) -> fx.Node:
        """A parameter on the left (`W @ x`) takes the role `weight`, and its gradient is `grad_weight`.

        The right operand lies as [K, N], so its blocks (of N by K, as everywhere: the contraction last) are turned.
        """
        swapped = weight_source(call.x) is not None and weight_source(call.w) is None
        a, b = (spec.weight, spec.input) if swapped else (spec.input, spec.weight)
        b = None if b is None else turned(b)
        left = self.pair(call, call.x, a, ([-1], [-2]), made.name, "weight" if swapped else "input")
        right = self.pair(call, call.w, b, ([-2], [-1]), made.name, "other")
        backward = exchanged(spec) if swapped else spec
        tail = (made.name, *(s.text if s is not None else "" for s in (a, b)), backward.backward_text, dtype)
        return self.emit(call, ops.matmul.default, call.x, call.w, left, right, *row, self.rng, *tail)

    def padding_row(self, call: SiteCall) -> Any:
        """The row without a gradient; -1 for none, where torch's function counts negative rows from the end."""
        row, table = call.options["padding_idx"], tensor(call.w)
        if row is None:
            return -1
        assert table is not None
        return row + table.shape[0] if row < 0 else row

    def convolution(self, call: SiteCall, made: SiteDecision, spec: SiteSpec, row: Row, tail: tuple[Any, ...]) -> fx.Node:
        value, o = tensor(call.x), call.options
        dims = len(o["stride"])
        x, padding = self.padded(call)
        batched = value is None or value.dim() == dims + 2
        x = x if batched else self.emit(call, torch.unsqueeze, x, 0)
        left = self.quantize(call, x, spec.input, [1], made.name, "input")
        channel = 1 if o["transposed"] else 0
        right = self.quantize(call, call.w, spec.weight, [d for d in range(dims + 2) if d != channel], made.name, "weight")
        geometry = (list(o["stride"]), padding, list(o["dilation"]), o["transposed"], list(o["output_padding"]), o["groups"])
        y = self.emit(call, ops.conv.default, x, call.w, call.bias, left, right, *row, self.rng, *geometry, *tail)
        return y if batched else self.emit(call, torch.squeeze, y, 0)

    def padded(self, call: SiteCall) -> tuple[Any, list[int]]:
        """The input and symmetric padding. "same" may need one more zero at the end of a dimension."""
        o, weight = call.options, tensor(call.w)
        if o["padding"] == "valid":
            return call.x, [0] * len(o["stride"])
        if o["padding"] != "same":
            return call.x, list(o["padding"])
        assert weight is not None
        totals = [d * (k - 1) for d, k in zip(o["dilation"], weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            sides = [side for total in reversed(totals) for side in (0, total % 2)]
            return self.emit(call, torch.nn.functional.pad, call.x, sides), [total // 2 for total in totals]
        return call.x, [total // 2 for total in totals]

    def rounded_output(self, call: SiteCall, made: SiteDecision, spec: TensorSpec, y: fx.Node, dtype: torch.dtype) -> fx.Node:
        pair = self.quantize(call, y, spec, [-1], made.name, "output")
        if not pair:  # calibrating
            return y
        q, scale = pair
        return self.emit(call, ops.dequantize.default, y, q, scale, spec.text, dtype)

    def attention(self, call: SiteCall, made: SiteDecision, spec: SiteSpec, dtype: torch.dtype) -> fx.Node:
        """Emulated fused attention: q, k, v (and its output) take values on the grid, gradients are rounded on the way."""
        operands = [call.x, call.w, call.options["value"]]
        rounded: list[Any] = []
        for name, x in zip(("query", "key", "value"), operands, strict=True):
            if spec.grad_input is not None:
                x = self.emit(call, ops.round_gradient.default, x, spec.grad_input.text, self.rng, f"{made.name}.{name}", "grad_input")
            if spec.input is not None:
                q, scale = self.quantize(call, x, spec.input, [-1], f"{made.name}.{name}", "input")
                value = tensor(operands[len(rounded)])
                kind = value.dtype if value is not None else dtype
                x = self.emit(call, ops.dequantize.default, x, q, scale, spec.input.text, kind)
            rounded.append(x)
        kwargs = dict(call.node.kwargs)
        rest = call.node.args[3:]
        for key in ("query", "key", "value"):
            kwargs.pop(key, None)
        y = self.graph.call_function(call.node.target, (*rounded, *rest), kwargs)  # type: ignore[arg-type]
        y.meta = dict(call.node.meta)
        y.meta.pop("decision", None)
        if spec.output is not None:
            y = self.rounded_output(call, made, spec.output, y, dtype)
        if spec.grad_output is not None:
            y = self.emit(call, ops.round_gradient.default, y, spec.grad_output.text, self.rng, made.name, "grad_output")
        return y


def exchanged(spec: SiteSpec) -> SiteSpec:
    """`spec` for the operands in the other order: the gradient of the first is `grad_weight`, that of the second `grad_input`."""
    other = {"output": "output", "grad_input": "grad_weight", "grad_weight": "grad_input"}
    gemms = tuple(gemm for gemm in GEMMS if other[gemm] in spec.gemms)
    output, first, second = spec.accumulate
    return spec.replace(grad_input=spec.grad_weight, grad_weight=spec.grad_input, gemms=gemms, accumulate=(output, second, first))
