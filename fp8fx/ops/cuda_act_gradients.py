"""The gradients of `act_linear` on CUDA devices, as codes, by the kernels of `fp8fx.kernels.activation_cast` and `activation_amax`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.kernels.activation_amax import activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activations import Kept
from fp8fx.ops.act_gradients import ActBackwardCast, ActBackwardGate, ActBackwardUp
from fp8fx.ops.arguments import takes
from fp8fx.ops.casts import GRADIENT
from fp8fx.ops.cuda_casts import laid_out, rounding_of
from fp8fx.spec import TensorSpec


def _kept(x: Tensor, block: Tensor | None) -> Tensor | Kept:
    return x if block is None else Kept(x, block)


@takes(ActBackwardCast)
def act_backward_cast(a: ActBackwardCast) -> tuple[Tensor, ...]:
    grad, parsed, gated = a.grad, TensorSpec.parse(a.spec), a.u.dim() > 1
    current, gate, other = parsed.scaling == "current", _kept(a.h, a.block_h), _kept(a.u, a.block_u) if gated else None
    hows = rounding_of(parsed, a.rng, a.site1, GRADIENT), rounding_of(parsed, a.rng, a.site2, GRADIENT)
    made = [grad.new_empty(1 if current and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    totals = [grad.new_empty(a.h.shape[-1] if a.sums and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    given: Any = (a.scale1, a.scale2) if parsed.scaling == "delayed" else (None, None)
    if current:
        given = activation_backward_amax(grad, gate, other, a.activation)
    first, second = activation_backward_cast(
        grad, gate, other, a.activation, parsed.format, given[0], given[1], a.layout, hows[0], hows[1], record=a.record1,
        record_u=a.record2 if gated else None,
        counts=a.record1 is not None, bias_grad=totals[0] if a.sums else None, bias_grad_u=totals[1] if a.sums and gated else None,
        from_amax=current, made_scale=made[0] if current else None, made_scale_u=made[1] if current and gated else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    q, qt = laid_out(grad, *first)
    q_u, qt_u = laid_out(grad, *second) if gated else (q.new_empty(0), q.new_empty(0))
    scales = [part.view(()) if part.numel() else part for part in made]
    return q, qt, scales[0], q_u, qt_u, scales[1], *totals


@takes(ActBackwardGate)
def act_backward_gate(a: ActBackwardGate) -> tuple[Tensor, ...]:
    grad, parsed = a.grad, TensorSpec.parse(a.spec)
    gate, other = _kept(a.h, a.block_h), _kept(a.u, a.block_u) if a.u.dim() > 1 else None
    current, how = parsed.scaling == "current", rounding_of(parsed, a.rng, a.site, GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(a.h.shape[-1] if a.sums else 0, dtype=torch.float32)
    given, amax_u = a.scale if parsed.scaling == "delayed" else None, grad.new_empty(0, dtype=torch.float32)
    if current:
        amax_u = grad.new_zeros(1, dtype=torch.float32) if other is not None else amax_u
        given, _ = activation_backward_amax(
            grad, gate, other, a.activation, grad.new_zeros(1, dtype=torch.float32), None if other is None else amax_u
        )
    first, _ = activation_backward_cast(
        grad, gate, other, a.activation, parsed.format, given, None, a.layout, how, record=a.record, counts=a.record is not None,
        bias_grad=total if a.sums else None, from_amax=current, made_scale=made if current else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps, only=True,
    )  # fmt: skip
    return *laid_out(grad, *first), made.view(()) if current else made, total, amax_u


@takes(ActBackwardUp)
def act_backward_up(a: ActBackwardUp) -> tuple[Tensor, ...]:
    """du = act(h) * da, by the forward's kernel."""
    grad, parsed, gate = a.grad, TensorSpec.parse(a.spec), _kept(a.h, a.block_h)
    current, how = parsed.scaling == "current", rounding_of(parsed, a.rng, a.site, GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(a.h.shape[-1] if a.sums else 0, dtype=torch.float32)
    given = a.amax if current else a.scale if parsed.scaling == "delayed" else None
    pair = activation_cast(
        gate, grad, a.activation, parsed.format, given, a.layout, how, record=a.record, counts=a.record is not None,
        from_amax=current, made_scale=made if current else None, power_of_two=parsed.power_of_two, eps=parsed.eps,
        bias_grad=total if a.sums else None,
    )  # fmt: skip
    return *laid_out(grad, *pair), made.view(()) if current else made, total
