"""act_linear on CUDA devices: the products of `fp8fx.ops.cuda`, and the kernels of `fp8fx.kernels.activation_*`.

Where h and u are kept in FP8, their high-precision forms are made and gone inside of the operator, and it sees to it that little of them
is alive at a time: a peak inside an operator is a peak.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.kernels import cast as kernel
from fp8fx.kernels.activation_amax import activation_amax
from fp8fx.kernels.activation_cast import activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.layout import cdiv, empty_transposed
from fp8fx.kernels.replay import taped
from fp8fx.ops.act import SIDE
from fp8fx.ops.act_linear import ActLinear
from fp8fx.ops.arguments import takes
from fp8fx.ops.cuda import linear
from fp8fx.ops.cuda_casts import laid_out, rounding_of
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import SiteSpec, TensorSpec

ROWS = 4096  # at a time, where h and u are only needed to make codes: enough for a product to run at full speed


class Inputs(NamedTuple):
    """What a = act(h) * u [M, H] is made of."""

    h: Tensor
    u: Tensor | None
    activation: str


class How(NamedTuple):
    """How a is cast: the fields of these names of `ActLinear`."""

    spec: str
    rng: Tensor | None
    site: str
    scale: Tensor | None
    record: Tensor | None
    layout: str

    def rounding(self) -> kernel.Rounding:
        return rounding_of(TensorSpec.parse(self.spec), self.rng, self.site, "input")


class Room(NamedTuple):
    """Memory for q [M, H] and qT [H, M] of a, each None where the layout leaves it out; for codes of h and u, and for their scales.

    row: of the whole, the one that the first of the rows at hand is.
    """

    q: Tensor | None
    q_t: Tensor | None
    q_h: Tensor
    q_u: Tensor
    block_h: Tensor
    block_u: Tensor
    row: int = 0

    @classmethod
    def of(cls, a: ActLinear, m: int, k: int) -> Room:
        new, codes = a.w1.new_empty, formats.get(TensorSpec.parse(a.spec).format).torch_dtype
        q = new((m, k), dtype=codes) if a.layout != "transposed" else None
        q_t = empty_transposed((m, k), codes, a.w1) if a.layout != "rows" else None
        size, blocks = (m, k), (m, cdiv(k, SIDE))
        q_h, q_u = new(size, dtype=torch.uint8), new(size if a.gated else (0,), dtype=torch.uint8)
        return cls(q, q_t, q_h, q_u, new(blocks, dtype=torch.float32), new(blocks if a.gated else (0,), dtype=torch.float32))


@takes(ActLinear)
def act_linear(a: ActLinear) -> tuple[Tensor, ...]:
    shape, how = (*a.x.shape[:-1], a.w1.shape[0]), How(a.spec, a.rng, a.site, a.scale, a.record, a.layout)
    if a.kept_in_fp8:
        q, qt, made, *kept = _kept_codes(a, how, a.w1.new_empty(shape, dtype=a.dtype, device="meta"))
    else:
        h, u = _products(a)
        q, qt, made = _act_cast(h, u, a.activation, *how)
        kept = [h.view(shape), h.new_empty(0) if u is None else u.view(shape), *(made.new_empty(0) for _ in range(2))]
    return make_anchor(shape, a.dtype, a.x.device), q if a.layout == "transposed" else q.view(shape), qt, made, *kept


def _products(a: ActLinear, rows: slice | None = None) -> tuple[Tensor, Tensor | None]:
    """h and u of some rows, or of all, as matrices."""
    part, codes = (a.x, a.input) if rows is None else (as_matrix(a.x)[rows], [as_matrix(a.input[0])[rows], a.input[1]])
    h = linear(*a.of_h(part, codes))
    return as_matrix(h), as_matrix(linear(*a.of_u(part, codes))) if a.gated else None


def _kept_codes(a: ActLinear, how: How, like: Tensor) -> tuple[Tensor, ...]:
    """q, qt and scale of a; codes of h and u and their scales. like: a meta tensor [..., H]."""
    matrix = as_matrix(like)
    m, k = matrix.shape
    if TensorSpec.parse(a.spec).scaling == "current":
        h, u = _products(a)
        *kept, parts = _act_keep(h, u, a.activation)
        del u
        return *_cast_parts(h, parts, *how), *kept
    room = Room.of(a, m, k)
    step = ROWS if m >= 2 * ROWS and not _draws(a) else max(m, 1)  # random bits are numbered by the rows of the whole
    for row in range(0, m, step):
        h, u = _products(a, slice(row, min(row + step, m)) if step < m else None)
        _act_into(h, u, a.activation, *how, *room._replace(row=row))
        del h, u  # before the next are made
    return *laid_out(matrix, room.q, room.q_t), a.w1.new_empty(0, dtype=torch.float32), room.q_h, room.q_u, room.block_h, room.block_u


def _draws(a: ActLinear) -> bool:
    """An output before the activation is rounded stochastically."""
    outputs = [SiteSpec.parse_backward(text).output for text in (a.backward1, a.backward2) if text]
    return any(output is not None and output.stochastic for output in outputs)


@taped
@takes(Inputs, How)
def _act_cast(inputs: Inputs, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """q, qt and scale (no elements where it is given, or 1) of a."""
    h, parsed = inputs.h, TensorSpec.parse(how.spec)
    current = parsed.scaling == "current"
    made = h.new_empty(1 if current else 0, dtype=torch.float32)
    given = activation_amax(*inputs) if current else how.scale if parsed.scaling == "delayed" else None
    pair = activation_cast(
        *inputs, parsed.format, given, how.layout, how.rounding(), record=how.record, from_amax=current,
        made_scale=made if current else None, power_of_two=parsed.power_of_two, eps=parsed.eps,
    )  # fmt: skip
    return *laid_out(h, *pair), made.view(()) if current else made


@taped
@takes(Inputs, How, Room)
def _act_into(inputs: Inputs, how: How, room: Room) -> tuple[Tensor, ...]:
    """Some rows of a, h and u, as codes, to their places in the whole."""
    parsed = TensorSpec.parse(how.spec)
    kept = Kept(room.q_h, room.block_h), None if inputs.u is None else Kept(room.q_u, room.block_u)
    activation_cast(
        *inputs, parsed.format, how.scale if parsed.scaling == "delayed" else None, how.layout, how.rounding(), record=how.record,
        kept=kept, into=(room.q, room.q_t, room.row),
    )  # fmt: skip
    return ()


@taped
def _act_keep(h: Tensor, u: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """Codes of h and u, their scales, and partial amaxes of a, which is written over h."""
    kept = Kept.empty(h), None if u is None else Kept.empty(u)
    parts = activation_keep(h, u, activation, kept)
    other = kept[1] or Kept(h.new_empty(0, dtype=torch.uint8), h.new_empty(0, dtype=torch.float32))
    return kept[0].q, other.q, kept[0].scale, other.scale, parts


@taped
def _cast_parts(a: Tensor, parts: Tensor, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, qt and scale of a, whose partial amaxes are known. fields: of `How`; its `scale` is of no use here."""
    how, made = How(*fields), a.new_empty(1, dtype=torch.float32)
    parsed = TensorSpec.parse(how.spec)
    pair = kernel.cast(
        a, parsed.format, parts, "tensor", how.layout, how.rounding(), None, how.record, False, None, True, made,
        parsed.power_of_two, parsed.eps,
    )  # fmt: skip
    return *laid_out(a, *pair), made.view(())
