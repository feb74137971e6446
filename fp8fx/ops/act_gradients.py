"""The gradients of an activation between linear layers, as codes only: what the backward of `act_linear` makes of da.

    act_backward_cast(da, h, u)    -> codes of dh = da * u * act'(h) and of du = da * act(h), in both layouts, and their sums over rows
    act_backward_gate(da, h, u)    -> those of dh alone
    act_backward_up(da, h)         -> those of du alone, which does not read u

h and u are tensors [M, H], or codes with the scales block_h and block_u (ops/act.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops.act import restore
from fp8fx.ops.arguments import signature, takes
from fp8fx.ops.casts import cast_current_fake, cast_current_reference, cast_fake, cast_reference
from fp8fx.ops.library import define
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.spec import TensorSpec

Quantized = tuple[Tensor, Tensor, Tensor]  # q, qt, scale; the scale has no elements where it is given, or 1


def cast_of(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> Quantized:
    """`x` cast as `spec` says, with one scale."""
    if TensorSpec.parse(spec).scaling == "current":
        return cast_current_reference(x, spec, rng, site, role, record, layout)[:3]
    return *cast_reference(x, spec, rng, site, role, scale, record, layout), x.new_empty(0, dtype=torch.float32)


def cast_of_fake(x: Tensor, spec: str, layout: str) -> Quantized:
    if TensorSpec.parse(spec).scaling == "current":
        return cast_current_fake(x, spec, None, "", "", None, layout)[:3]
    return *cast_fake(x, spec, None, "", "", None, None, layout), x.new_empty(0, dtype=torch.float32)


def _known(x: Tensor, block: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if block is None else restore(x, block, dtype)


class ActBackwardGate(NamedTuple):
    """The arguments of `act_backward_gate`: da [M, H]; h and u, and their scales where those are codes; how dh is cast."""

    grad: Tensor
    h: Tensor
    u: Tensor  # without elements where there is none
    block_h: Tensor | None
    block_u: Tensor | None
    activation: str
    rng: Tensor | None
    site: str
    spec: str
    scale: Tensor | None
    record: Tensor | None
    layout: str
    sums: bool


class ActBackwardUp(NamedTuple):
    """The arguments of `act_backward_up`. amax: that of du from act_backward_gate, which kernels need for current scaling."""

    grad: Tensor
    h: Tensor
    block_h: Tensor | None
    activation: str
    rng: Tensor | None
    site: str
    spec: str
    scale: Tensor | None
    amax: Tensor | None
    record: Tensor | None
    layout: str
    sums: bool


class ActBackwardCast(NamedTuple):
    """The arguments of `act_backward_cast`: those of the other two, what is said of dh ending in 1, and of du in 2."""

    grad: Tensor
    h: Tensor
    u: Tensor
    block_h: Tensor | None
    block_u: Tensor | None
    activation: str
    rng: Tensor | None
    site1: str
    site2: str
    spec: str
    scale1: Tensor | None
    scale2: Tensor | None
    record1: Tensor | None
    record2: Tensor | None
    layout: str
    sums: bool

    def gate(self) -> ActBackwardGate:
        how = self.rng, self.site1, self.spec, self.scale1, self.record1, self.layout, self.sums
        return ActBackwardGate(self.grad, self.h, self.u, self.block_h, self.block_u, self.activation, *how)

    def up(self, amax: Tensor | None) -> ActBackwardUp:
        how = self.rng, self.site2, self.spec, self.scale2, amax, self.record2, self.layout, self.sums
        return ActBackwardUp(self.grad, self.h, self.block_h, self.activation, *how)


@takes(ActBackwardCast)
def act_backward_cast_reference(a: ActBackwardCast) -> tuple[Tensor, ...]:
    """(q, qt, scale) of dh = da * u * act'(h), the same of du = da * act(h), and their float32 [H] sums over rows.

    Without elements: what belongs to u where that has none, and the sums where they are not asked for.
    """
    gated = a.u.numel() > 0 or a.h.numel() == 0
    q, qt, scale, total, _ = act_backward_gate_reference(*a.gate())
    if not gated:
        other = cast_of_fake(a.grad.new_empty(0, 1), a.spec, a.layout)
        return q, qt, scale, *(t.new_empty(0) for t in other), total, a.grad.new_empty(0, dtype=torch.float32)
    *second, total_u = act_backward_up_reference(*a.up(None))
    return q, qt, scale, *second, total, total_u


@takes(ActBackwardCast)
def act_backward_cast_fake(a: ActBackwardCast) -> tuple[Tensor, ...]:
    made = cast_of_fake(a.grad, a.spec, a.layout)
    total, nothing = _sum_fake(a.grad, a.sums), a.grad.new_empty(0, dtype=torch.float32)
    if a.u.dim() == 1:
        return *made, *(t.new_empty(0) for t in made), total, nothing
    return *made, *cast_of_fake(a.grad, a.spec, a.layout), total, torch.empty_like(total)


def _sum_fake(grad: Tensor, sums: bool) -> Tensor:
    return grad.new_empty(grad.shape[-1] if sums else 0, dtype=torch.float32)


act_backward_cast = define(
    f"act_backward_cast({signature(ActBackwardCast)})"
    " -> (Tensor q, Tensor qt, Tensor scale, Tensor q_u, Tensor qt_u, Tensor scale_u, Tensor sum, Tensor sum_u)",
    act_backward_cast_reference,
    act_backward_cast_fake,
)


@takes(ActBackwardGate)
def act_backward_gate_reference(a: ActBackwardGate) -> tuple[Tensor, ...]:
    """(q, qt, scale, sum) of dh; and, for current scaling of a gated form, the amax of du, float32 [1], which one reading finds too."""
    forward, backward = ACTIVATIONS[a.activation]
    gated, h = a.u.numel() > 0 or a.h.numel() == 0, _known(a.h, a.block_h, a.grad.dtype)
    dh = backward(a.grad * _known(a.u, a.block_u, a.grad.dtype) if gated else a.grad, h)
    made = cast_of(dh, a.spec, a.rng, a.site, "grad_output", a.scale, a.record, a.layout)
    nothing = a.grad.new_empty(0, dtype=torch.float32)
    current = gated and TensorSpec.parse(a.spec).scaling == "current"
    amax_u = numerics.amax(a.grad * forward(h)).view(1) if current else nothing.clone()
    return *made, dh.sum(0, dtype=torch.float32) if a.sums else nothing, amax_u


@takes(ActBackwardGate)
def act_backward_gate_fake(a: ActBackwardGate) -> tuple[Tensor, ...]:
    current = a.u.dim() > 1 and TensorSpec.parse(a.spec).scaling == "current"
    amax_u = a.grad.new_empty(1 if current else 0, dtype=torch.float32)
    return *cast_of_fake(a.grad, a.spec, a.layout), _sum_fake(a.grad, a.sums), amax_u


act_backward_gate = define(
    f"act_backward_gate({signature(ActBackwardGate)}) -> (Tensor q, Tensor qt, Tensor scale_made, Tensor sum, Tensor amax_u)",
    act_backward_gate_reference,
    act_backward_gate_fake,
)


@takes(ActBackwardUp)
def act_backward_up_reference(a: ActBackwardUp) -> tuple[Tensor, ...]:
    """(q, qt, scale, sum) of du."""
    du = a.grad * ACTIVATIONS[a.activation][0](_known(a.h, a.block_h, a.grad.dtype))
    made = cast_of(du, a.spec, a.rng, a.site, "grad_output", a.scale, a.record, a.layout)
    return *made, du.sum(0, dtype=torch.float32) if a.sums else a.grad.new_empty(0, dtype=torch.float32)


@takes(ActBackwardUp)
def act_backward_up_fake(a: ActBackwardUp) -> tuple[Tensor, ...]:
    return *cast_of_fake(a.grad, a.spec, a.layout), _sum_fake(a.grad, a.sums)


act_backward_up = define(
    f"act_backward_up({signature(ActBackwardUp)}) -> (Tensor q, Tensor qt, Tensor scale_made, Tensor sum)",
    act_backward_up_reference,
    act_backward_up_fake,
)
