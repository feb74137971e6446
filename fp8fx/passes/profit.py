"""Does FP8 pay? *annotate* asks for a graph on a GPU, leaves in high precision what FP8 would not make faster, and says what runs the rest.

A linear layer's gain is that of the measured cost model (fp8fx.costs): three GEMMs against three, and the casts. What has no kernel would
be emulated, which is never faster: everything, on a GPU without FP8 or where Triton is not to be had. `when_not_faster: emulate` keeps FP8
there, for its numbers; so do convolutions, which have no other form on a GPU yet, and formats and scales that only an emulation has.

Sizes that change are judged at those that the graph was captured with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fp8fx import costs
from fp8fx.capture.graph import hint, tensor
from fp8fx.capture.sites import CONVOLUTIONS, SiteCall
from fp8fx.ops.available import no_kernels
from fp8fx.passes.contract import Context, SiteDecision
from fp8fx.passes.has_kernels import obstacle, only_emulated
from fp8fx.passes.products import products
from fp8fx.spec import SiteSpec

LEAST = 1.02  # the gain below which FP8 is not worth its rounding
_KEEP = "(when_not_faster: emulate keeps FP8)"


@dataclass(frozen=True)
class Profit:
    """Of FP8 sites, by index. left: why a site does better in high precision. notes: what runs a site that stays, for the plan."""

    left: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)


def profit(decisions: Sequence[SiteDecision], calls: Sequence[SiteCall | None], keep: Sequence[bool], context: Context) -> Profit:
    """`keep`: sites whose recipe says `emulate`."""
    found = Profit()
    if context.device != "cuda" or context.calibrating:
        return found
    problem = no_kernels(context.device_name, context.capability)
    layers: dict[int, costs.Layer] = {}
    readers: dict[fx.Node, int] = {}
    for made, call in zip(decisions, calls, strict=True):
        if made.mode == "fp8" and call is not None and call.op == "linear" and isinstance(call.x, fx.Node):
            readers[call.x] = readers.get(call.x, 0) + 1
    for i, (made, call) in enumerate(zip(decisions, calls, strict=True)):
        if made.mode != "fp8" or made.spec is None or call is None:
            continue
        why, wanted = _emulated(call, made, problem)
        if why and (wanted or keep[i]):
            found.notes[i] = f"emulated: {why}"
        elif why:
            found.left[i] = f"{why}, and emulating {'it' if call.op != 'linear' else 'FP8'} is slower {_KEEP}"
        elif layer := _layer(call, made.spec, readers):
            found.notes[i] = _kernels(layer, call, made.spec, context)
            if not keep[i]:
                layers[i] = layer
    _choose(layers, context, found)
    return found


def _choose(layers: dict[int, costs.Layer], context: Context, found: Profit) -> None:
    """What the cost model says of `layers`, and of each in turn."""
    table = costs.load(context.device_name) if context.device_name else costs.load()
    if context.cuda_graphs:
        table = table.without_host()
    for i, chosen in zip(layers, costs.choose(list(layers.values()), table, LEAST), strict=True):
        gain = costs.cost(layers[i], table).gpu_speedup
        if chosen:
            found.notes[i] = f"{gain:.2f} times as fast by the cost model; {found.notes[i]}"
            continue
        del found.notes[i]
        if gain <= LEAST:
            found.left[i] = f"FP8 does not pay here: {gain:.2f} times as fast by the cost model {_KEEP}"
        else:
            found.left[i] = (
                f"FP8 does not pay here: {gain:.2f} times as fast on the GPU by the cost model, but its launches take the host longer than "
                f'that saves: inner_mode="reduce-overhead" launches the graph as a whole {_KEEP}'
            )


def _emulated(call: SiteCall, made: SiteDecision, problem: str) -> tuple[str, bool]:
    """Why no kernel runs this site, or nothing; and whether it is emulated all the same, since only an emulation has what is asked for."""
    assert made.spec is not None
    if call.op in CONVOLUTIONS:
        return "convolutions have no FP8 kernel yet", True
    asked = made.emulate_attention or only_emulated(made.spec)
    if call.op != "linear":
        return f"{call.op} has no FP8 kernel", asked
    if problem:
        return problem, asked
    x, w = tensor(call.x), tensor(call.w)
    if x is None or w is None:
        return "", False
    return obstacle(made.spec, made.spec.input, made.spec.weight, x.dim(), (x.dtype, w.dtype)), asked


def _layer(call: SiteCall, spec: SiteSpec, readers: dict[fx.Node, int]) -> costs.Layer | None:
    """The layer as the cost model takes it; None where a size or a role is not known."""
    x, w, out = tensor(call.x), tensor(call.w), tensor(call.node)
    if x is None or w is None or out is None or w.dim() != 2 or spec.input is None:
        return None
    sizes = [hint(size, unknown=0) for size in (*x.shape[:-1], *(w.shape[::-1] if call.transposed_weight else w.shape))]
    if not all(sizes):
        return None
    *rows, n, k = sizes
    m = math.prod(rows)
    shared = readers.get(call.x, 1) if isinstance(call.x, fx.Node) else 1
    # A layer whose scales are kept is judged as in training, also in evaluation: in FP8 there alone it would read scales never set.
    trains = bool(out.requires_grad) or any(r is not None and r.scaling == "delayed" for r in (spec.input, spec.weight))
    role = spec.input
    # Under autocast the product's dtype is not its operands'.
    return costs.Layer(m, k, n, trains, role.scaling, role.granularity, out.dtype, spec.accumulate, shared, x.dtype, w.dtype)


def _kernels(layer: costs.Layer, call: SiteCall, spec: SiteSpec, context: Context) -> str:
    """Whose products run the layer's GEMMs."""
    hopper = context.capability is None or context.capability[0] == 9
    x, w, bias = tensor(call.x), tensor(call.w), tensor(call.bias)
    assert x is not None
    assert w is not None
    dtypes = (layer.dtype, x.dtype, w.dtype)
    return products((layer.m, layer.k, layer.n), spec, dtypes, None if bias is None else bias.dtype, layer.training, hopper)
