"""annotate: write a decision on every site, never an edge.

    enters   a captured graph: sites named, values known
    leaves   the same graph; each site has meta["decision"] = SiteDecision(mode, spec, reason)
    holds    every site has exactly one decision, and every decision has a reason the plan can print

        linear(x, w, b)    site 'fc1'      ->   linear(x, w, b)    site 'fc1', fp8: e4m3fn x e4m3fn, gradients e5m2

The recipe decides what is wanted; this pass adds what the graph knows: what cannot be quantized here (and why), and which
outputs the next operation reads in high precision anyway (conv -> batch norm, linear -> activation, scores -> softmax).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fp8fx.arithmetic.room import overflow_note
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.capture.graph import ALIASES, MODULE, SITE, VAL, tensor
from fp8fx.capture.naming import weight_source
from fp8fx.capture.sites import CONVOLUTIONS, SiteCall, read_site, unsupported
from fp8fx.passes.contract import DECISION, Context, PassResult, SiteDecision, Skip
from fp8fx.passes.kept import NO_ACTIVATION, Activation, activation_after
from fp8fx.passes.profit import profit
from fp8fx.recipe import Decision, Site
from fp8fx.spec import ROLES, SiteSpec, TensorSpec

ACTIVATIONS = {
    F.relu, torch.relu, F.gelu, F.silu, F.sigmoid, torch.sigmoid, torch.tanh, F.tanh, F.leaky_relu, F.elu, F.relu6, F.hardswish,
    F.hardtanh, F.mish, F.softplus, F.selu, F.hardsigmoid, F.prelu, "relu", "relu_", "sigmoid", "tanh", torch.relu_,
}  # fmt: skip
BATCH_NORMS = {F.batch_norm, torch.batch_norm, F.instance_norm, F.group_norm}
SOFTMAXES = {F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, "softmax", "log_softmax"}
# What may stand between scores and their softmax: scaling, masking, casting.
BETWEEN = {
    operator.mul, operator.truediv, operator.add, operator.sub, torch.mul, torch.div, torch.add, "mul", "div", "add",
    "masked_fill", torch.where, "to", "float", "type_as", torch.masked_fill, operator.iadd, operator.imul, operator.itruediv,
}  # fmt: skip


def annotate(module: fx.GraphModule, context: Context) -> PassResult:
    nodes = [node for node in module.graph.nodes if SITE in node.meta]
    calls = [read_site(node) for node in nodes]
    sites = [_site(node, call, context) for node, call in zip(nodes, calls, strict=True)]
    resolution = context.recipe.resolve(sites, context.modules, partial=not context.complete)
    modified = False
    decisions = [_decide(*each, context) for each in zip(nodes, calls, sites, resolution.decisions, strict=True)]
    keep = [wanted.when_not_faster == "emulate" for wanted in resolution.decisions]
    found = profit(decisions, calls, keep, context)
    for i, reason in found.left.items():
        decisions[i] = SiteDecision(sites[i].name, sites[i].op, "high_precision", reason)
    for i, note in found.notes.items():
        decisions[i] = dataclasses.replace(decisions[i], reason=f"{decisions[i].reason}; {note}")
    kept = _keeping(nodes, decisions)
    for node, made in zip(nodes, decisions, strict=True):
        modified |= node.meta.get(DECISION) != made
        node.meta[DECISION] = made
    return PassResult(module, modified, [Skip("recipe", "", note) for note in [*resolution.notes, *kept]])


def _keeping(nodes: list[fx.Node], decisions: list[SiteDecision]) -> list[str]:
    """Settle `save_activation_inputs: fp8` of every site: its reason says what keeps its output. Notes where that has no effect at all."""
    asks = {node: i for i, node in enumerate(nodes) if (spec := decisions[i].spec) is not None and spec.save_activation_inputs == "fp8"}
    found = {i: activation_after(node, asks) for node, i in asks.items()}
    for i, activation in found.items():
        made, reason = decisions[i], decisions[i].reason
        assert made.spec is not None
        if isinstance(activation, Activation):
            decisions[i] = dataclasses.replace(made, reason=f"{reason}; {activation.name} keeps its output as e4m3fn/1x128")
            continue
        if activation != NO_ACTIVATION:
            reason = f"{reason}; save_activation_inputs: fp8 has no effect: {activation}"
        decisions[i] = dataclasses.replace(made, reason=reason, spec=made.spec.replace(save_activation_inputs="model"))
    if asks and all(activation == NO_ACTIVATION for activation in found.values()):
        return [f"save_activation_inputs: fp8 has no effect here: for every layer that asks for it, {NO_ACTIVATION}"]
    return []


def _site(node: fx.Node, call: SiteCall | None, context: Context) -> Site:
    weight = tensor(_weight(call)) if call is not None else None
    return Site(
        name=node.meta[SITE],
        op=call.op if call is not None else str(getattr(node.target, "__name__", node.target)),
        types=context.modules.get(node.meta.get(MODULE, ""), ()),
        numel=0 if weight is None else int(weight.numel()),
        has_weight=weight is not None,
        aliases=node.meta.get(ALIASES, ()),
    )


def _weight(call: SiteCall) -> Any:
    """The operand that is a parameter, or None. `W @ x` has it on the left."""
    operands = [] if call.op == "attention" else [call.w, call.x] if call.op in ("matmul", "bmm") else [call.w]
    return next((operand for operand in operands if weight_source(operand) is not None), None)


def _decide(node: fx.Node, call: SiteCall | None, site: Site, wanted: Decision, context: Context) -> SiteDecision:
    if wanted.mode == "exempt" or wanted.spec is None:
        return SiteDecision(site.name, site.op, "exempt", wanted.reason)
    if call is None:
        return SiteDecision(site.name, site.op, "high_precision", unsupported(node) or "an embedding that indexes its table itself")
    spec, why = _with_scales_here(call, _applicable(call, wanted.spec), wanted.reason)
    if spec.output is not None and (reader := _fused_reader(node)):
        spec, why = spec.replace(output=None), f"{why}; output fused into {reader}"
    elif wanted.output_fused:
        why = f"{why}; output fused"
    if reason := _obstacle(call, spec, wanted.attention):
        return SiteDecision(site.name, site.op, "high_precision", reason)
    if context.calibrating:
        if not any(role is not None and role.scaling == "delayed" for role in (getattr(spec, name) for name in ROLES)):
            return SiteDecision(site.name, site.op, "high_precision", "calibrating, and no scale of it is kept")
        spec = spec.replace(gemms=(), calibrating=True)
    if note := _room(spec):
        why = f"{why}; {note}"
    return SiteDecision(site.name, site.op, "fp8", why, spec, emulate_attention=call.op == "attention")


def _with_scales_here(call: SiteCall, spec: SiteSpec, why: str) -> tuple[SiteSpec, str]:
    """A delayed scale is kept under the name of a parameter: a site without one scales by what it sees."""
    delayed = {name: role for name in ROLES if (role := getattr(spec, name)) is not None and role.scaling == "delayed"}
    if not delayed or _weight(call) is not None:
        return spec, why
    changed = {name: dataclasses.replace(role, scaling="current") for name, role in delayed.items()}
    return spec.replace(**changed), f"{why}; no parameter, so current scaling"


def _obstacle(call: SiteCall, spec: SiteSpec, attention: str) -> str | None:
    """Why this call cannot run in FP8 here, or None."""
    operands = [call.w] if call.op == "embedding" else [call.x, call.w]
    values = [tensor(operand) for operand in operands if _known(operand)]
    if any(value is None for value in values):
        return "an operand is not a tensor"
    kinds = [value.dtype for value in values if value is not None]
    if not all(kind.is_floating_point for kind in kinds):
        return f"operands are {', '.join(str(kind).removeprefix('torch.') for kind in kinds)}, not floating point"
    if len(set(kinds)) > 1 and (own := tensor(call.node)) is not None and own.dtype == functools.reduce(torch.promote_types, kinds):
        # Autocast would give its own dtype. Without it torch refuses them, and so the plain call must be the one that runs.
        return f"operands are {' and '.join(str(kind).removeprefix('torch.') for kind in kinds)}: the model itself cannot multiply them"
    if call.op == "attention" and spec.arithmetic is not None:
        return "fused attention has its own products (arithmetic)"
    if call.op == "attention":
        return "fused attention stays in high precision (attention: high_precision)" if attention != "emulate" else _idle(call, spec)
    if call.op in ("matmul", "bmm") and any(value is not None and value.dim() < 2 for value in values):
        return "a product with a vector"
    return _form_obstacle(call) or _geometry_obstacle(call, spec) or _arithmetic_obstacle(call, spec) or _idle(call, spec)


def _form_obstacle(call: SiteCall) -> str | None:
    """Forms of a call that its fp8fx operator does not have."""
    weight = tensor(call.w)
    if call.node.kwargs.get("out") is not None:
        return "it writes its result to out="
    if call.op == "grouped_mm":
        return _grouped_obstacle(call)
    if call.op == "linear" and weight is not None and weight.dim() != 2:
        return f"a linear whose weight has {weight.dim()} dimension{'s' * (weight.dim() != 1)}"
    return None


def _grouped_obstacle(call: SiteCall) -> str | None:
    """Only groups of rows, [S, K] by [E, K, N], are a layer's product; torch has two more forms, for gradients."""
    x, w = tensor(call.x), tensor(call.w)
    if (x is not None and x.dim() != 2) or (w is not None and w.dim() != 3):
        return "a grouped_mm whose groups are not the rows of its first operand"
    return "a grouped_mm with a bias or out_dtype" if call.options["extra"] else None


def _idle(call: SiteCall, spec: SiteSpec) -> str | None:
    """Why nothing of this site would be rounded, or None. A role that only GEMMs in high precision read rounds nothing."""
    if all(getattr(spec, role) is None for role in ROLES):
        return "no role of this recipe applies here"
    results = (spec.output, spec.grad_input, spec.grad_weight)
    if call.op != "attention" and not spec.gemms and all(role is None for role in results):
        return "all of its products stay in high precision (gemms)"
    return None


def _known(operand: Any) -> bool:
    """False for a node whose value nobody has computed: a symbolic trace without example inputs."""
    return not isinstance(operand, fx.Node) or VAL in operand.meta


def _geometry_obstacle(call: SiteCall, spec: SiteSpec) -> str | None:
    specs = [getattr(spec, role) for role in ROLES]
    granularities = {s.granularity for s in specs if s is not None}
    if call.op == "grouped_mm" and granularities - {"tensor"}:
        return "a grouped_mm takes one scale per tensor only (granularity: tensor)"
    others = {s.granularity for role, s in zip(ROLES, specs, strict=True) if s is not None and role != "weight"}
    if call.op in CONVOLUTIONS and (others - {"tensor"} or _blocks(spec.weight)):
        return "a convolution takes one scale per tensor only (granularity: tensor; of its weight also channel)"
    if call.op == "embedding":
        if call.options["max_norm"] is not None or call.options["sparse"]:
            return "an embedding with max_norm or sparse gradients"
        if any(not isinstance(g, str) for g in granularities):
            return "an embedding has no block scales"
    return None


def _blocks(spec: TensorSpec | None) -> bool:
    return spec is not None and not isinstance(spec.granularity, str)


def _arithmetic_obstacle(call: SiteCall, spec: SiteSpec) -> str | None:
    """What a layer's own arithmetic does not reach: convolutions become products by unfolding where torch can, with ordinary gradients."""
    if spec.arithmetic is None:
        return None
    if call.op == "grouped_mm" or (call.op in CONVOLUTIONS and call.op not in ("conv1d", "conv2d")):
        return f"{call.op} has no form for an arithmetic of its own"
    wanted = Arithmetic.parse(spec.arithmetic)
    if call.op in CONVOLUTIONS and wanted.gradients == "same":
        return "a convolution's gradients are ordinary ones (arithmetic: gradients: exact)"
    table = wanted.table(None)
    if table is None or table.mantissa_bits is not None or "output" not in spec.gemms:
        return None
    roles = [spec.input, spec.weight, *([spec.grad_output] if wanted.gradients == "same" else [])]
    if None in roles:
        names = {"high precision" if role is None else role.format for role in roles}
        return f"a table over codes needs every operand in one format of 8 bits; here they are {', '.join(sorted(names))}"
    return table.mismatch([role.format for role in roles if role is not None])


def _room(spec: SiteSpec) -> str | None:
    """What to say of an arithmetic in whose formats a product of codes overflows."""
    if spec.arithmetic is None:
        return None
    wanted = Arithmetic.parse(spec.arithmetic)
    operands = {
        "output": (spec.input, spec.weight),
        "grad_input": (spec.grad_output, spec.weight),
        "grad_weight": (spec.grad_output, spec.input),
    }
    having = [operands[gemm] for gemm in spec.gemms if gemm == "output" or wanted.gradients == "same"]
    return overflow_note(wanted, [(a.format, b.format) for a, b in having if a is not None and b is not None])


def _applicable(call: SiteCall, spec: SiteSpec) -> SiteSpec:
    """Drop roles the operation does not have, so that the plan shows only what happens."""
    if call.op == "embedding":  # its output is a row of the quantized table: on the grid already
        gemms = tuple(gemm for gemm in spec.gemms if gemm != "grad_input")
        return spec.replace(input=None, output=None, grad_input=None, gemms=gemms, accumulate=SiteSpec.accumulate)
    if call.op == "attention":
        return spec.replace(weight=None, grad_weight=None)
    if call.op in ("matmul", "bmm"):
        weights = [weight_source(operand) is not None for operand in (call.x, call.w)]
        if all(weights):
            return spec.replace(input=spec.weight)
        if not any(weights):
            return spec.replace(weight=spec.input)  # a product of two activations: both are inputs
    if spec.save_for_backward == "high_precision" and spec.input is not None and spec.input.stochastic:
        return spec.replace(save_for_backward="fp8")  # random bits are not drawn twice
    return spec


def _fused_reader(node: fx.Node) -> str | None:
    """The operation that reads this output in high precision, if every reader is such an operation."""
    readers = {_reads_high_precision(user) for user in node.users}
    return None if not readers or None in readers else ", ".join(sorted(r for r in readers if r))


def _reads_high_precision(node: fx.Node) -> str | None:
    if node.target in ACTIVATIONS or node.target in BATCH_NORMS:
        return _label(node)
    seen: Any = node
    while seen.target in BETWEEN and len(seen.users) == 1:
        seen = next(iter(seen.users))
    return _label(seen) if seen.target in SOFTMAXES else None


def _label(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
