# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activations that write FP8: what feeds the second matrix product of an MLP, and what its backward feeds the first with.

    activation_cast            y  = act(h)            or act(h) * u             -> q, qT, record of y
    activation_backward_cast   dh = dy * act'(h)      or dy * u * act'(h)       -> q, qT, record and sum over the rows of dh
                               du =                      dy * act(h)            -> q, qT, record and sum over the rows of du

act: silu, gelu (erf), gelu_tanh or relu; silu with u is SwiGLU, gelu with u GeGLU. Each intermediate is rounded to h's dtype where the
unfused operators round it, so that codes differ from theirs only where the exponential's last bit does, or, of gelu_tanh, where their
1 + tanh cancels. One read of h, u and dy, in quarters (see `quarters`). A tile cannot know the amax of the whole: scales are given (delayed
scaling), or made from an amax that `activation_amax` measured (current scaling), or there is none.

h and u can be kept for the backward in FP8 (`Kept`): forward writes their codes beside q and qT, and backward reads those. The two results
of a gated backward can be written by two launches, so that u is free before the second: `only` dh, and then du as the forward's
act(h) * dy, to the bit.

Reference: torch's activation and `fp8fx.numerics.quantize_scaled`; of the backward, `fp8fx.ops.act_gradients`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.activations import ACTIVATIONS, Kept, backward, check_operands, forward, keep, pointers, values
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.column_sums import check_sum, partials, sum_partials
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import Matrices, pitch, plain_matrices
from fp8fx.kernels.quarters import locate_tile
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import Pair, Result, Scaling, tensor_inverse, write_result
from fp8fx.kernels.rounding import NEAREST, Rounding

# BLOCK_M, BLOCK_K, num_warps. Twice as wide, the backward of SwiGLU takes 13% longer, for its registers.
_FORWARD, _BACKWARD = (32, 128, 4), (32, 64, 4)


@triton.jit(do_not_specialize=["key", "key_u", "row"])
def _activation_kernel(
    dy_ptr,
    h_ptr,
    u_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    made_ptr,
    record_ptr,
    sums_ptr,
    q_u_ptr,
    t_u_ptr,
    scale_u_ptr,
    made_u_ptr,
    record_u_ptr,
    sums_u_ptr,
    rng_ptr,
    key,
    key_u,
    M,
    K,
    stride_db,
    stride_dm,
    stride_hb,
    stride_hm,
    stride_ub,
    stride_um,
    block_h_ptr,
    block_u_ptr,
    kept_h_ptr,
    kept_u_ptr,
    row,
    BACKWARD: tl.constexpr,
    WHAT: tl.constexpr,  # as `activations` says
    TWO: tl.constexpr,  # du too
    KEEP: tl.constexpr,  # write codes of h and u
    HOW: tl.constexpr,
    HOW_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = (row // BLOCK_M) * tl.cdiv(K, BLOCK_K)
    place, rows, words, columns = locate_tile(tl.program_id(0) + first, M, K, BLOCK_M, BLOCK_K)
    h_ptr -= row.to(tl.int64) * stride_hm  # h and u may begin at this row of the whole
    u_ptr -= row.to(tl.int64) * stride_um
    at = (rows, words, columns)
    strides = (stride_db, stride_dm, 1), (stride_hb, stride_hm, 1), (stride_ub, stride_um, 1)
    inputs = (dy_ptr, h_ptr, u_ptr, block_h_ptr, block_u_ptr)
    into = (q_ptr, t_ptr, scale_ptr, made_ptr, record_ptr, sums_ptr)
    # Scales come after what is rounded: making one from partial amaxes ends in a barrier, behind which no load would start.
    if BACKWARD:
        a0, b0 = backward(inputs, strides, place, rows, columns, WHAT)
        a1, b1 = backward(inputs, strides, place, rows + 1, columns, WHAT)
        a2, b2 = backward(inputs, strides, place, rows + 2, columns, WHAT)
        a3, b3 = backward(inputs, strides, place, rows + 3, columns, WHAT)
        if TWO:
            into_u = (q_u_ptr, t_u_ptr, scale_u_ptr, made_u_ptr, record_u_ptr, sums_u_ptr)
            write_result(b0, b1, b2, b3, into_u, (rng_ptr, key_u), place, at, tensor_inverse(into_u, HOW_U), BLOCK_M, HOW_U)
    else:
        a0, b0, c0 = forward(inputs, strides, place, rows, columns, WHAT)
        a1, b1, c1 = forward(inputs, strides, place, rows + 1, columns, WHAT)
        a2, b2, c2 = forward(inputs, strides, place, rows + 2, columns, WHAT)
        a3, b3, c3 = forward(inputs, strides, place, rows + 3, columns, WHAT)
        if KEEP:
            _keep(b0, b1, b2, b3, kept_h_ptr, block_h_ptr, place, rows, columns)
            if WHAT[1]:
                _keep(c0, c1, c2, c3, kept_u_ptr, block_u_ptr, place, rows, columns)
    write_result(a0, a1, a2, a3, into, (rng_ptr, key), place, at, tensor_inverse(into, HOW), BLOCK_M, HOW)


@triton.jit
def _keep(x0, x1, x2, x3, q_ptr, scale_ptr, place, rows, columns):
    keep(x0, q_ptr, scale_ptr, place, rows, columns)
    keep(x1, q_ptr, scale_ptr, place, rows + 1, columns)
    keep(x2, q_ptr, scale_ptr, place, rows + 2, columns)
    keep(x3, q_ptr, scale_ptr, place, rows + 3, columns)


def activation_cast(
    h: Tensor | Kept,
    u: Tensor | None,
    activation: str,
    format: str | Format,
    scale: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    amax: Tensor | None = None,
    record: Tensor | None = None,
    counts: bool = False,
    from_amax: bool = False,
    made_scale: Tensor | None = None,
    power_of_two: bool = False,
    eps: float = 1e-12,
    bias_grad: Tensor | None = None,
    kept: tuple[Kept, Kept | None] | None = None,
    into: tuple[Tensor | None, Tensor | None, int] | None = None,
) -> Pair:
    """(q [..., M, K], qT [..., K, M]) of act(h), or act(h) * u; h and u bf16, fp16 or fp32 [..., M, K].

    scale: float32 with one element, or None. from_amax: `scale` is what `activation_amax` returned instead, and the scale made from it
    with `power_of_two` and `eps` goes to `made_scale`, float32 with one element; of two, the second gets the amax.
    record: float32 [3], see `records`; counts: also of zeros; amax: a record of one element, amax alone. bias_grad: float [K], set to
    the sum over the rows. kept: room for the codes of h and u, which are written too (`Kept.empty`). into: (q, qT, row) of a whole of
    which h and u [m, K] are the rows from `row` on, a multiple of 32, as `kept` is then of the whole; qT as `layout.empty_transposed`
    makes it.
    """
    wanted = _Wanted(Scaling(scale, from_amax, made_scale, power_of_two, eps), how, record, amax, bias_grad)
    return _launch(None, (h, u), activation, format, (wanted,), layout, counts, kept, into)[0]


def activation_backward_cast(
    dy: Tensor,
    h: Tensor | Kept,
    u: Tensor | Kept | None,
    activation: str,
    format: str | Format,
    scale: Tensor | None = None,
    scale_u: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    how_u: Rounding | None = None,
    amax: Tensor | None = None,
    amax_u: Tensor | None = None,
    record: Tensor | None = None,
    record_u: Tensor | None = None,
    counts: bool = False,
    bias_grad: Tensor | None = None,
    bias_grad_u: Tensor | None = None,
    from_amax: bool = False,
    made_scale: Tensor | None = None,
    made_scale_u: Tensor | None = None,
    power_of_two: bool = False,
    eps: float = 1e-12,
    only: bool = False,
) -> tuple[Pair, Pair]:
    """((q, qT) of dh, (q, qT) of du), the second (None, None) where u is None, or `only` dh is wanted: du is activation_cast(h, dy) then.

    Both scales or none; `how_u` may differ in its key only.

    bias_grad, bias_grad_u: float [K], set to the sums of dh and du over the rows. The rest as for `activation_cast`, `*_u` for du.
    """
    dh = _Wanted(Scaling(scale, from_amax, made_scale, power_of_two, eps), how, record, amax, bias_grad)
    du = _Wanted(Scaling(scale_u, from_amax, made_scale_u, power_of_two, eps), how_u or how, record_u, amax_u, bias_grad_u)
    pairs = _launch(dy, (h, u), activation, format, (dh,) if u is None or only else (dh, du), layout, counts)
    return pairs[0], pairs[1] if len(pairs) == 2 else (None, None)


class _Wanted(NamedTuple):
    """What a caller wants of one result: how it is scaled and rounded, its record, and where its sum over the rows goes."""

    scaling: Scaling
    how: Rounding
    record: Tensor | None
    amax: Tensor | None
    sums: Tensor | None


def _launch(
    dy: Tensor | None,
    inputs: tuple[Tensor | Kept, Tensor | Kept | None],
    activation: str,
    format: str | Format,
    wanted: tuple[_Wanted, ...],
    layout: str,
    counts: bool,
    kept: tuple[Kept, Kept | None] | None = None,
    into: tuple[Tensor | None, Tensor | None, int] | None = None,
) -> list[Pair]:
    """(q, qT) of each result that is wanted: y without dy; dh, or dh and du, with it."""
    where = "activation_cast" if dy is None else "activation_backward_cast"
    h, u = inputs
    first = check_operands(where, dy, h, u, activation)
    if (wanted[0].scaling.scale is None) != (wanted[-1].scaling.scale is None):
        raise KernelError("activation_backward_cast: scales of dh and du come together")
    fp8, (block_m, block_k, warps) = hardware_format(format), _FORWARD if dy is None else _BACKWARD
    seen = [plain_matrices(first if x is None else x) for x in (dy, values(h), values(u))]
    tiles, row = seen[1].tiles(block_m, block_k), 0
    if into is not None:
        seen[1], row = _part(where, seen[1], *into, block_m), into[2]
    outs = [want.sums for want in wanted if want.sums is not None]
    parts = partials(first, seen[1].tile_rows(block_m), seen[1].k, len(outs)) if outs else None
    left = iter(()) if parts is None else iter(parts.unbind(1))
    results, flags = [], []
    for want in wanted:
        part = None if want.sums is None else next(left)
        result, flag = _result(where, want, first, fp8, layout, seen[1], part, counts, into)
        results.append(result)
        flags.append(flag)
    if first.numel() == 0:
        _of_nothing(results, fp8, outs)
        return [result.pair for result in results]
    launch(
        _activation_kernel,
        (tiles,),
        (*_arguments(first, seen, results, wanted), *_kept_pointers(first, h, u, kept), row),
        {
            "BACKWARD": dy is not None,
            "WHAT": (ACTIVATIONS[activation], u is not None, isinstance(h, Kept), isinstance(u, Kept)),
            "TWO": len(wanted) == 2,
            "KEEP": kept is not None,
            "HOW": flags[0],
            "HOW_U": flags[-1],
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    if parts is not None:
        sum_partials(parts, *outs)
    return [result.pair for result in results]


def _result(
    where: str,
    want: _Wanted,
    first: Tensor,
    fp8: Format,
    layout: str,
    x: Matrices,
    part: Tensor | None,
    counts: bool,
    into: tuple[Tensor | None, Tensor | None, int] | None,
) -> tuple[Result, tuple[object, ...]]:
    """Room for a result, or its place in the whole that `into` says; and HOW. part: room for its partial sums."""
    want.scaling.check(where)
    check_sum(where, want.sums, x.k)
    record, recording = check_record(where, want.record, want.amax, counts)
    if into is None:
        result = Result.empty(first, fp8, layout, want.scaling, record, part)
    else:
        result = Result(*into[:2], want.scaling, record, part)
    return result, result.how(fp8, want.how, x, recording)


def _of_nothing(results: list[Result], fp8: Format, outs: list[Tensor]) -> None:
    """What the kernel would write beside the codes of empty tensors."""
    for result in results:
        result.scaling.of_nothing(fp8)
    for out in outs:
        out.zero_()


def _arguments(first: Tensor, seen: list[Matrices], results: list[Result], wanted: tuple[_Wanted, ...]) -> tuple[Any, ...]:
    """The kernel's, up to the strides. A pointer that it does not follow is that of `first`."""
    rng = wanted[0].how.rng
    return (
        *(x.x for x in seen),
        *results[0].pointers(first),
        *results[-1].pointers(first),
        first if rng is None else rng,
        wanted[0].how.signed_key,
        wanted[-1].how.signed_key,
        seen[1].m,
        seen[1].k,
        *(stride for x in seen for stride in x.strides[:2]),
    )


def _kept_pointers(first: Tensor, h: Tensor | Kept, u: Tensor | Kept | None, kept: tuple[Kept, Kept | None] | None) -> tuple[Tensor, ...]:
    """The scales of what is kept of h and u, to be read or to be written; where their codes are written."""
    if kept is None:
        return *pointers(first, h, u), first, first
    return *pointers(first, *kept), kept[0].q, first if kept[1] is None else kept[1].q


def _part(where: str, x: Matrices, q: Tensor | None, t: Tensor | None, row: int, block_m: int) -> Matrices:
    """x, the rows from `row` on of a whole that q [M, K] and qT [K, M] are made of, with the rows of the whole."""
    m = q.shape[0] if q is not None else t.shape[1] if t is not None else 0
    if x.batches != 1 or row % block_m or row + x.m > m or (row + x.m < m and x.m % block_m):
        raise KernelError(f"{where}: rows {row} to {row + x.m} of {m} are not whole tiles of {block_m} rows")
    if t is not None and t.stride() != (pitch(m), 1):
        raise KernelError(f"{where}: qT of {m} rows must have strides {(pitch(m), 1)}, see `layout.empty_transposed`; got {t.stride()}")
    return x._replace(m=m)
