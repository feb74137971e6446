"""The gradients of an activation between linear layers, as codes only: what the backward of `act_linear` makes of da.

    act_backward_cast(da, h, u)    -> codes of dh = da * u * act'(h) and of du = da * act(h), in both layouts, and their sums over rows
    act_backward_gate(da, h, u)    -> those of dh alone
    act_backward_up(da, h)         -> those of du alone, which does not read u

h and u are tensors [M, H], or codes with the scales block_h and block_u (ops/act.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops.act import restore
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


def act_backward_cast_reference(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    block_h: Tensor | None,
    block_u: Tensor | None,
    activation: str,
    rng: Tensor | None,
    site1: str,
    site2: str,
    spec: str,
    scale1: Tensor | None,
    scale2: Tensor | None,
    record1: Tensor | None,
    record2: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """From da [M, H]: (q, qt, scale) of dh = da * u * act'(h), the same of du = da * act(h), and their float32 [H] sums over rows.

    Without elements: what belongs to u where that has none, and the sums where they are not asked for. block_h, block_u: the scales of h
    and u where those are codes.
    """
    gated = u.numel() > 0 or h.numel() == 0
    q, qt, scale, total, _ = act_backward_gate_reference(
        grad, h, u, block_h, block_u, activation, rng, site1, spec, scale1, record1, layout, sums
    )
    if not gated:
        other = cast_of_fake(grad.new_empty(0, 1), spec, layout)
        return q, qt, scale, *(t.new_empty(0) for t in other), total, grad.new_empty(0, dtype=torch.float32)
    *second, total_u = act_backward_up_reference(grad, h, block_h, activation, rng, site2, spec, scale2, None, record2, layout, sums)
    return q, qt, scale, *second, total, total_u


def act_backward_cast_fake(grad: Tensor, h: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    spec, layout, sums = rest[6], rest[-2], rest[-1]
    made = cast_of_fake(grad, spec, layout)
    total, nothing = grad.new_empty(grad.shape[-1] if sums else 0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    if u.dim() == 1:
        return *made, *(t.new_empty(0) for t in made), total, nothing
    return *made, *cast_of_fake(grad, spec, layout), total, torch.empty_like(total)


act_backward_cast = define(
    "act_backward_cast(Tensor grad, Tensor h, Tensor u, Tensor? block_h, Tensor? block_u, str activation, Tensor? rng, str site1,"
    " str site2, str spec, Tensor? scale1, Tensor? scale2, Tensor? record1, Tensor? record2, str layout, bool sums)"
    " -> (Tensor q, Tensor qt, Tensor scale, Tensor q_u, Tensor qt_u, Tensor scale_u, Tensor sum, Tensor sum_u)",
    act_backward_cast_reference,
    act_backward_cast_fake,
)


def act_backward_gate_reference(
    grad: Tensor,
    h: Tensor,
    u: Tensor,
    block_h: Tensor | None,
    block_u: Tensor | None,
    activation: str,
    rng: Tensor | None,
    site: str,
    spec: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """(q, qt, scale, sum) of dh; and, for current scaling of a gated form, the amax of du, float32 [1], which one reading finds too."""
    forward, backward = ACTIVATIONS[activation]
    gated, h = u.numel() > 0 or h.numel() == 0, _known(h, block_h, grad.dtype)
    dh = backward(grad * _known(u, block_u, grad.dtype) if gated else grad, h)
    made = cast_of(dh, spec, rng, site, "grad_output", scale, record, layout)
    nothing = grad.new_empty(0, dtype=torch.float32)
    current = gated and TensorSpec.parse(spec).scaling == "current"
    amax_u = numerics.amax(grad * forward(h)).view(1) if current else nothing.clone()
    return *made, dh.sum(0, dtype=torch.float32) if sums else nothing, amax_u


def act_backward_gate_fake(grad: Tensor, h: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    spec, layout, sums = rest[5], rest[-2], rest[-1]
    current = u.dim() > 1 and TensorSpec.parse(spec).scaling == "current"
    sizes = grad.shape[-1] if sums else 0, 1 if current else 0
    return *cast_of_fake(grad, spec, layout), *(grad.new_empty(size, dtype=torch.float32) for size in sizes)


act_backward_gate = define(
    "act_backward_gate(Tensor grad, Tensor h, Tensor u, Tensor? block_h, Tensor? block_u, str activation, Tensor? rng, str site, str spec,"
    " Tensor? scale, Tensor? record, str layout, bool sums) -> (Tensor q, Tensor qt, Tensor scale_made, Tensor sum, Tensor amax_u)",
    act_backward_gate_reference,
    act_backward_gate_fake,
)


def act_backward_up_reference(
    grad: Tensor,
    h: Tensor,
    block_h: Tensor | None,
    activation: str,
    rng: Tensor | None,
    site: str,
    spec: str,
    scale: Tensor | None,
    amax: Tensor | None,
    record: Tensor | None,
    layout: str,
    sums: bool,
) -> tuple[Tensor, ...]:
    """(q, qt, scale, sum) of du. amax: that of du from act_backward_gate, which kernels need for current scaling."""
    du = grad * ACTIVATIONS[activation][0](_known(h, block_h, grad.dtype))
    made = cast_of(du, spec, rng, site, "grad_output", scale, record, layout)
    return *made, du.sum(0, dtype=torch.float32) if sums else grad.new_empty(0, dtype=torch.float32)


def act_backward_up_fake(grad: Tensor, h: Tensor, block_h: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    spec, layout, sums = rest[3], rest[-2], rest[-1]
    return *cast_of_fake(grad, spec, layout), grad.new_empty(grad.shape[-1] if sums else 0, dtype=torch.float32)


act_backward_up = define(
    "act_backward_up(Tensor grad, Tensor h, Tensor? block_h, str activation, Tensor? rng, str site, str spec, Tensor? scale, Tensor? amax,"
    " Tensor? record, str layout, bool sums) -> (Tensor q, Tensor qt, Tensor scale_made, Tensor sum)",
    act_backward_up_reference,
    act_backward_up_fake,
)
