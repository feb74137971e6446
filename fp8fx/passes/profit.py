"""Does FP8 pay? *annotate* asks for a graph on a GPU, and leaves in high precision what FP8 would not make faster.

A linear layer's gain is that of the measured cost model (fp8fx.costs): three GEMMs against three, and the casts. What has no kernel would
be emulated, which is never faster: everything, on a GPU without FP8 or where Triton is not to be had. `when_not_faster: emulate` keeps FP8
there, for its numbers; so do convolutions, which have no other form on a GPU yet, and formats and scales that only an emulation has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fp8fx import costs
from fp8fx.capture.graph import tensor
from fp8fx.capture.sites import CONVOLUTIONS, SiteCall
from fp8fx.ops.available import no_kernels
from fp8fx.passes.contract import Context, SiteDecision
from fp8fx.spec import ROLES, SiteSpec, TensorSpec

HARDWARE = ("e4m3fn", "e5m2")
LEAST = 1.02  # the gain below which FP8 is not worth its rounding


def without_gain(
    decisions: Sequence[SiteDecision], calls: Sequence[SiteCall | None], keep: Sequence[bool], context: Context
) -> dict[int, str]:
    """Index -> reason, of the FP8 sites that do better in high precision. `keep`: sites whose recipe says `emulate`."""
    if context.device != "cuda" or context.calibrating:
        return {}
    found: dict[int, str] = {}
    problem = no_kernels(context.device_name, context.capability)
    layers: dict[int, costs.Layer] = {}
    readers: dict[fx.Node, int] = {}
    for made, call in zip(decisions, calls, strict=True):
        if made.mode == "fp8" and call is not None and call.op == "linear" and isinstance(call.x, fx.Node):
            readers[call.x] = readers.get(call.x, 0) + 1
    for i, (made, call) in enumerate(zip(decisions, calls, strict=True)):
        if made.mode != "fp8" or made.spec is None or call is None or keep[i] or made.emulate_attention or not _on_hardware(made.spec):
            continue
        if call.op in CONVOLUTIONS:
            continue
        if call.op != "linear":
            found[i] = f"{call.op} has no FP8 kernel, and emulating it is slower (when_not_faster: emulate keeps FP8)"
        elif problem:
            found[i] = f"{problem}, and emulating FP8 is slower (when_not_faster: emulate keeps FP8)"
        elif layer := _layer(call, made.spec, readers):
            layers[i] = layer
    table = costs.load(context.device_name) if context.device_name else costs.load()
    if context.cuda_graphs:
        table = table.without_host()
    for i, chosen in zip(layers, costs.choose(list(layers.values()), table, LEAST), strict=True):
        if not chosen:
            gain = costs.cost(layers[i], table).gpu_speedup
            found[i] = f"FP8 does not pay here: {gain:.2f} times as fast by the cost model (when_not_faster: emulate keeps FP8)"
    return found


def _on_hardware(spec: SiteSpec) -> bool:
    if spec.arithmetic is not None:  # a study: only its numbers are asked for
        return False
    roles: list[TensorSpec | None] = [getattr(spec, role) for role in ROLES]
    rounds = ("nearest_even", "stochastic")
    return all(
        role is None or (role.format in HARDWARE and role.rounding in rounds and role.on_hardware and role.sides_on_hardware)
        for role in roles
    )


def _layer(call: SiteCall, spec: SiteSpec, readers: dict[fx.Node, int]) -> costs.Layer | None:
    """The layer as the cost model takes it; None where a size or a role is not known."""
    x, w, out = tensor(call.x), tensor(call.w), tensor(call.node)
    if x is None or w is None or out is None or w.dim() != 2 or spec.input is None:
        return None
    n, k = w.shape if not call.transposed_weight else w.shape[::-1]
    m = torch.Size(x.shape[:-1]).numel() if all(isinstance(size, int) for size in x.shape) else 0
    if m == 0:  # sizes that change: the recipe decides alone
        return None
    shared = readers.get(call.x, 1) if isinstance(call.x, fx.Node) else 1
    # A layer whose scales are kept is judged as in training, also in evaluation: in FP8 there alone it would read scales never set.
    trains = bool(out.requires_grad) or any(r is not None and r.scaling == "delayed" for r in (spec.input, spec.weight))
    role = spec.input
    return costs.Layer(m, int(k), int(n), trains, role.scaling, role.granularity, x.dtype, spec.accumulate, shared)
