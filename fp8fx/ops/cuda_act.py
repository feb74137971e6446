"""The operators of activations on CUDA devices: act, act_linear and its gradients, by the kernels of `fp8fx.kernels.activation_*`.

Where `act_linear` keeps h and u in FP8, their high-precision forms are made and gone inside of it, and it sees to it that little of them
is alive at a time: a peak inside an operator is a peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.kernels import cast as kernel
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.layout import cdiv
from fp8fx.kernels.replay import taped
from fp8fx.ops import act as act_op
from fp8fx.ops import casts
from fp8fx.ops.act import KEPT
from fp8fx.ops.act_linear import kept_in_fp8
from fp8fx.ops.cuda import linear
from fp8fx.ops.cuda_casts import DTYPES, laid_out, rounding_of
from fp8fx.ops.mlp import ACTIVATIONS
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import SiteSpec, TensorSpec

ROWS = 4096  # at a time, where h and u are only needed to make codes: enough for a product to run at full speed


def act_linear(
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    input: list[Tensor],
    weight1: list[Tensor],
    weight2: list[Tensor],
    record1: Tensor | None,
    record2: Tensor | None,
    scales1: Tensor | None,
    scales2: Tensor | None,
    scale: Tensor | None,
    record: Tensor | None,
    rng: Tensor | None,
    activation: str,
    site1: str,
    site2: str,
    input_spec: str,
    weight1_spec: str,
    weight2_spec: str,
    backward1: str,
    backward2: str,
    spec: str,
    site: str,
    layout: str,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    def of_rows(rows: slice | None) -> tuple[Tensor, Tensor | None]:
        """h and u of some rows, or of all, as matrices."""
        part, codes = (x, input) if rows is None else (as_matrix(x)[rows], [as_matrix(input[0])[rows], input[1]])
        h = linear(part, w1, b1, codes, weight1, None, None, rng, site1, input_spec, weight1_spec, backward1, dtype)
        if w2 is None:
            return as_matrix(h), None
        u = linear(part, w2, b2, codes, weight2, None, None, rng, site2, input_spec, weight2_spec, backward2, dtype)
        return as_matrix(h), as_matrix(u)

    shape, how = (*x.shape[:-1], w1.shape[0]), (spec, rng, site, scale, record, layout)
    if kept_in_fp8(backward1):
        like = w1.new_empty(shape, dtype=dtype, device="meta")
        q, qt, made, *kept = _kept_codes(of_rows, like, w1, w2 is not None, _draws(backward1, backward2), activation, *how)
    else:
        h, u = of_rows(None)
        q, qt, made = _ACT_CAST(h, u, activation, *how)
        kept = [h.view(shape), h.new_empty(0) if u is None else u.view(shape), *(made.new_empty(0) for _ in range(2))]
    return make_anchor(shape, dtype, x.device), q if layout == "transposed" else q.view(shape), qt, made, *kept


def _draws(*backward: str) -> bool:
    """An output before the activation is rounded stochastically."""
    return any((out := SiteSpec.parse_backward(text).output) is not None and out.stochastic for text in backward if text)


def _kept_codes(
    of_rows: Callable[[slice | None], tuple[Tensor, Tensor | None]],
    like: Tensor,
    w: Tensor,
    gated: bool,
    draws: bool,
    activation: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
) -> tuple[Tensor, ...]:
    """q, qt and scale of a; codes of h and u and their scales. like: a meta tensor [..., H]; w: for its device."""
    matrix = as_matrix(like)
    m = matrix.shape[0]
    if TensorSpec.parse(spec).scaling == "current":
        h, u = of_rows(None)
        *kept, parts = _ACT_KEEP(h, u, activation)
        del u
        return *_CAST_PARTS(h, parts, spec, rng, site, record, layout), *kept
    q, q_t, *kept = _room(matrix, w, TensorSpec.parse(spec).format, layout, gated)
    step = ROWS if m >= 2 * ROWS and not draws else max(m, 1)  # random bits are numbered by the rows of the whole
    for row in range(0, m, step):
        h, u = of_rows(slice(row, min(row + step, m)) if step < m else None)
        _ACT_INTO(h, u, activation, spec, rng, site, scale, record, q, q_t, row, *kept)
        del h, u  # before the next are made
    return *laid_out(matrix, q, q_t), w.new_empty(0, dtype=torch.float32), *kept


def _room(like: Tensor, w: Tensor, format: str, layout: str, gated: bool) -> tuple[Any, ...]:
    """Memory for q [M, H] and qT [H, M], each None where `layout` leaves it out; for codes of h and u, and for their scales."""
    m, k = like.shape
    codes, blocks = formats.get(format).torch_dtype, (m, cdiv(k, act_op.SIDE))
    q = w.new_empty((m, k), dtype=codes) if layout != "transposed" else None
    q_t = w.new_empty((k, m), dtype=codes) if layout != "rows" else None
    kept = [w.new_empty(size, dtype=torch.uint8) for size in ((m, k), (m, k) if gated else (0,))]
    return q, q_t, *kept, *(w.new_empty(size, dtype=torch.float32) for size in (blocks, blocks if gated else (0,)))


def _act_into(
    h: Tensor,
    u: Tensor | None,
    activation: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    q: Tensor | None,
    q_t: Tensor | None,
    row: int,
    q_h: Tensor,
    q_u: Tensor,
    block_h: Tensor,
    block_u: Tensor,
) -> tuple[Tensor, ...]:
    """The rows of a, h and u from `row` on, as codes, to their places in the whole."""
    parsed = TensorSpec.parse(spec)
    layout = "both" if q is not None and q_t is not None else "rows" if q_t is None else "transposed"
    activation_cast(
        h, u, activation, parsed.format, scale if parsed.scaling == "delayed" else None, layout, rounding_of(parsed, rng, site, "input"),
        record=record, kept=(Kept(q_h, block_h), None if u is None else Kept(q_u, block_u)), into=(q, q_t, row),
    )  # fmt: skip
    return ()


def _act_keep(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """Codes of h and u, their scales, and partial amaxes of a, which is written over h."""
    kept = Kept.empty(h), None if u is None else Kept.empty(u)
    parts = activation_keep(h, u, activation, kept)
    other = kept[1] or Kept(h.new_empty(0, dtype=torch.uint8), h.new_empty(0, dtype=torch.float32))
    return kept[0].q, other.q, kept[0].scale, other.scale, parts


def _cast_parts(
    a: Tensor, parts: Tensor, spec: str, rng: Tensor | None, site: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, qt and scale of a, whose partial amaxes are known."""
    parsed, made = TensorSpec.parse(spec), a.new_empty(1, dtype=torch.float32)
    pair = kernel.cast(
        a, parsed.format, parts, "tensor", layout, rounding_of(parsed, rng, site, "input"), None, record, False, None, True, made,
        parsed.power_of_two, parsed.eps,
    )  # fmt: skip
    return *laid_out(a, *pair), made.view(())


def _act_cast(
    h: Tensor,
    u: Tensor | None,
    activation: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, qt and scale (no elements where it is given, or 1) of act(h) * u [M, H]."""
    parsed = TensorSpec.parse(spec)
    how, made = rounding_of(parsed, rng, site, "input"), h.new_empty(1 if parsed.scaling == "current" else 0, dtype=torch.float32)
    current = parsed.scaling == "current"
    given = activation_amax(h, u, activation) if current else scale if parsed.scaling == "delayed" else None
    q, q_t = activation_cast(
        h, u, activation, parsed.format, given, layout, how, record=record, from_amax=current, made_scale=made if current else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    return *laid_out(h, q, q_t), made.view(()) if current else made


def act(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """Not fused: torch's own activation, and a cast of h and u."""
    y = ACTIVATIONS[activation][0](h)
    return y if u is None else y * u, *_keep(h, h), *_keep(u, h)


def _keep(x: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    if x is None or x.dtype not in DTYPES:
        return act_op.keep(x, like)
    made = cast_block(as_matrix(x), KEPT.format, (1, act_op.SIDE), None, "rows", kernel.NEAREST, KEPT.power_of_two, KEPT.eps)
    assert made.q is not None
    assert made.scale is not None
    return made.q.view(torch.uint8), made.scale


def act_backward(
    grad: Tensor, q_h: Tensor, scale_h: Tensor, q_u: Tensor | None, scale_u: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    forward, backward = ACTIVATIONS[activation]
    h = _restore(q_h, scale_h, grad)
    if q_u is None or scale_u is None:
        return backward(grad, h), grad.new_empty(0)
    du = grad * forward(h)
    return backward(grad * _restore(q_u, scale_u, grad), h), du


def _restore(q: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """In like's dtype throughout: bfloat16 holds codes, powers of two and their products. The reference where that is not so."""
    m, k = q.shape
    if like.dtype == torch.float16 or k % act_op.SIDE:
        return act_op.restore(q, scale, like.dtype).view(like.shape)
    values = q.view(torch.float8_e4m3fn).to(like.dtype).view(m, k // act_op.SIDE, act_op.SIDE)
    return values.mul_(scale.to(like.dtype).unsqueeze(-1)).view(like.shape)


def _kept(x: Tensor, block: Tensor | None) -> Tensor | Kept:
    return x if block is None else Kept(x, block)


def act_backward_cast(
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
    parsed, gated = TensorSpec.parse(spec), u.dim() > 1
    current, gate, other = parsed.scaling == "current", _kept(h, block_h), _kept(u, block_u) if gated else None
    hows = rounding_of(parsed, rng, site1, casts.GRADIENT), rounding_of(parsed, rng, site2, casts.GRADIENT)
    made = [grad.new_empty(1 if current and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    totals = [grad.new_empty(h.shape[-1] if sums and wanted else 0, dtype=torch.float32) for wanted in (True, gated)]
    given: Any = (scale1, scale2) if parsed.scaling == "delayed" else (None, None)
    if current:
        given = activation_backward_amax(grad, gate, other, activation)
    first, second = activation_backward_cast(
        grad, gate, other, activation, parsed.format, given[0], given[1], layout, hows[0], hows[1], record=record1,
        record_u=record2 if gated else None,
        counts=record1 is not None, bias_grad=totals[0] if sums else None, bias_grad_u=totals[1] if sums and gated else None,
        from_amax=current, made_scale=made[0] if current else None, made_scale_u=made[1] if current and gated else None,
        power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    q, qt = laid_out(grad, *first)
    q_u, qt_u = laid_out(grad, *second) if gated else (q.new_empty(0), q.new_empty(0))
    scales = [part.view(()) if part.numel() else part for part in made]
    return q, qt, scales[0], q_u, qt_u, scales[1], *totals


def act_backward_gate(
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
    parsed, gate, other = TensorSpec.parse(spec), _kept(h, block_h), _kept(u, block_u) if u.dim() > 1 else None
    current, how = parsed.scaling == "current", rounding_of(parsed, rng, site, casts.GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(h.shape[-1] if sums else 0, dtype=torch.float32)
    given, amax_u = scale if parsed.scaling == "delayed" else None, grad.new_empty(0, dtype=torch.float32)
    if current:
        amax_u = grad.new_zeros(1, dtype=torch.float32) if other is not None else amax_u
        given, _ = activation_backward_amax(
            grad, gate, other, activation, grad.new_zeros(1, dtype=torch.float32), None if other is None else amax_u
        )
    first, _ = activation_backward_cast(
        grad, gate, other, activation, parsed.format, given, None, layout, how, record=record, counts=record is not None,
        bias_grad=total if sums else None, from_amax=current, made_scale=made if current else None, power_of_two=parsed.power_of_two,
        eps=parsed.eps, only=True,
    )  # fmt: skip
    return *laid_out(grad, *first), made.view(()) if current else made, total, amax_u


def act_backward_up(
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
    """du = act(h) * da, by the forward's kernel: its silu may differ in the last bit."""
    parsed, gate = TensorSpec.parse(spec), _kept(h, block_h)
    current, how = parsed.scaling == "current", rounding_of(parsed, rng, site, casts.GRADIENT)
    made = grad.new_empty(1 if current else 0, dtype=torch.float32)
    total = grad.new_empty(h.shape[-1] if sums else 0, dtype=torch.float32)
    given = amax if current else scale if parsed.scaling == "delayed" else None
    pair = activation_cast(
        gate, grad, activation, parsed.format, given, layout, how, record=record, counts=record is not None, from_amax=current,
        made_scale=made if current else None, power_of_two=parsed.power_of_two, eps=parsed.eps, bias_grad=total if sums else None,
    )  # fmt: skip
    return *laid_out(grad, *pair), made.view(()) if current else made, total


_ACT_CAST, _ACT_INTO, _ACT_KEEP, _CAST_PARTS = taped(_act_cast), taped(_act_into), taped(_act_keep), taped(_cast_parts)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "act": act,
    "act_backward": act_backward,
    "act_linear": act_linear,
    "act_backward_cast": taped(act_backward_cast),
    "act_backward_gate": taped(act_backward_gate),
    "act_backward_up": taped(act_backward_up),
}
