# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activations that write FP8: what feeds the second matrix product of an MLP, and what its backward feeds the first with.

    activation_cast            y  = act(h)            or act(h) * u             -> q, qT, record of y
    activation_backward_cast   dh = dy * act'(h)      or dy * u * act'(h)       -> q, qT, record and sum over the rows of dh
                               du =                      dy * act(h)            -> q, qT, record and sum over the rows of du

act: silu, gelu (erf), gelu_tanh or relu; silu with u is SwiGLU, gelu with u GeGLU. Each intermediate is rounded to h's dtype where the
unfused operators round it, so that codes differ from theirs only where the exponential's last bit does. One read of h, u and dy, in
quarters (see `quarters`). A tile cannot know the amax of the whole: scales are given (delayed scaling), or made from an amax that
`activation_amax` measured (current scaling), or there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.activations import ACTIVATIONS, backward, check_operands, forward
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.column_sums import check_sum, partials, sum_partials
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import plain_matrices
from fp8fx.kernels.quarters import locate
from fp8fx.kernels.records import check_record
from fp8fx.kernels.results import Pair, Result, Scaling, tensor_inverse, write_result
from fp8fx.kernels.rounding import NEAREST, Rounding

# BLOCK_M, BLOCK_K, num_warps. Twice as wide, the backward of SwiGLU takes 13% longer, for its registers.
_FORWARD, _BACKWARD = (32, 128, 4), (32, 64, 4)


@triton.jit(do_not_specialize=["key", "key_u"])
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
    BACKWARD: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HOW: tl.constexpr,
    HOW_U: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    at = (rows, words, columns)
    dys, hs, us = (stride_db, stride_dm, 1), (stride_hb, stride_hm, 1), (stride_ub, stride_um, 1)
    into = (q_ptr, t_ptr, scale_ptr, made_ptr, record_ptr, sums_ptr)
    # Scales come after what is rounded: making one from partial amaxes ends in a barrier, behind which no load would start.
    if BACKWARD:
        a0, b0 = backward(dy_ptr, h_ptr, u_ptr, place, rows, columns, dys, hs, us, ACT, GATED)
        a1, b1 = backward(dy_ptr, h_ptr, u_ptr, place, rows + 1, columns, dys, hs, us, ACT, GATED)
        a2, b2 = backward(dy_ptr, h_ptr, u_ptr, place, rows + 2, columns, dys, hs, us, ACT, GATED)
        a3, b3 = backward(dy_ptr, h_ptr, u_ptr, place, rows + 3, columns, dys, hs, us, ACT, GATED)
        if GATED:
            into_u = (q_u_ptr, t_u_ptr, scale_u_ptr, made_u_ptr, record_u_ptr, sums_u_ptr)
            write_result(b0, b1, b2, b3, into_u, (rng_ptr, key_u), place, at, tensor_inverse(into_u, HOW_U), BLOCK_M, HOW_U)
    else:
        a0 = forward(h_ptr, u_ptr, place, rows, columns, hs, us, ACT, GATED)
        a1 = forward(h_ptr, u_ptr, place, rows + 1, columns, hs, us, ACT, GATED)
        a2 = forward(h_ptr, u_ptr, place, rows + 2, columns, hs, us, ACT, GATED)
        a3 = forward(h_ptr, u_ptr, place, rows + 3, columns, hs, us, ACT, GATED)
    write_result(a0, a1, a2, a3, into, (rng_ptr, key), place, at, tensor_inverse(into, HOW), BLOCK_M, HOW)


def activation_cast(
    h: Tensor,
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
) -> Pair:
    """(q [..., M, K], qT [..., K, M]) of act(h), or act(h) * u; h and u bf16, fp16 or fp32 [..., M, K].

    scale: float32 with one element, or None. from_amax: `scale` is what `activation_amax` returned instead, and the scale made from it
    with `power_of_two` and `eps` goes to `made_scale`, float32 with one element; of two, the second gets the amax.
    record: float32 [3], see `records`; counts: also of zeros; amax: a record of one element, amax alone.
    """
    scaling = Scaling(scale, from_amax, made_scale, power_of_two, eps)
    return _launch(None, (h, u), activation, format, (scaling, scaling), layout, (how, how), ((record, amax), (None, None)), counts)[0]


def activation_backward_cast(
    dy: Tensor,
    h: Tensor,
    u: Tensor | None,
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
) -> tuple[Pair, Pair]:
    """((q, qT) of dh, (q, qT) of du), the second (None, None) where u is None. Both scales or none; `how_u` may differ in its key only.

    bias_grad, bias_grad_u: float [K], set to the sums of dh and du over the rows. The rest as for `activation_cast`, `*_u` for du.
    """
    scalings = (Scaling(scale, from_amax, made_scale, power_of_two, eps), Scaling(scale_u, from_amax, made_scale_u, power_of_two, eps))
    records, sums = ((record, amax), (record_u, amax_u)), (bias_grad, bias_grad_u)
    return _launch(dy, (h, u), activation, format, scalings, layout, (how, how_u or how), records, counts, sums)


def _launch(
    dy: Tensor | None,
    inputs: tuple[Tensor, Tensor | None],
    activation: str,
    format: str | Format,
    scalings: tuple[Scaling, Scaling],
    layout: str,
    hows: tuple[Rounding, Rounding],
    records: tuple[Pair, Pair],
    counts: bool,
    sums: Pair = (None, None),
) -> tuple[Pair, Pair]:
    where = "activation_cast" if dy is None else "activation_backward_cast"
    h, u = inputs
    check_operands(where, dy, h, u, activation)
    two = dy is not None and u is not None
    if two and (scalings[0].scale is None) != (scalings[1].scale is None):
        raise KernelError("activation_backward_cast: scales of dh and du come together")
    fp8, (block_m, block_k, warps) = hardware_format(format), _FORWARD if dy is None else _BACKWARD
    seen = [plain_matrices(h if x is None else x) for x in (dy, h, u)]
    _, _, m, k, _ = seen[1]
    outs = [out for out in sums[: 2 if two else 1] if out is not None]
    parts = partials(h, seen[1].tile_rows(block_m), k, len(outs)) if outs else None
    left = iter(()) if parts is None else iter(parts.unbind(1))
    results, flags = [], []
    for i in range(2 if two else 1):
        scalings[i].check(where)
        check_sum(where, sums[i], k)
        record, recording = check_record(where, *records[i], counts)
        results.append(Result.empty(h, fp8, layout, scalings[i], record, None if sums[i] is None else next(left)))
        flags.append(results[i].how(fp8, hows[i], seen[1], recording))
    pairs = (results[0].pair, results[1].pair if two else (None, None))
    if h.numel() == 0:
        for result in results:
            result.scaling.of_nothing(fp8)
        for out in outs:
            out.zero_()
        return pairs
    rng = hows[0].rng
    launch(
        _activation_kernel,
        (seen[1].tiles(block_m, block_k),),
        (
            *(x.x for x in seen),
            *results[0].pointers(h),
            *results[-1].pointers(h),
            h if rng is None else rng,
            hows[0].signed_key,
            hows[1].signed_key,
            m,
            k,
            *(stride for x in seen for stride in x.strides[:2]),
        ),
        {
            "BACKWARD": dy is not None,
            "ACT": ACTIVATIONS[activation],
            "GATED": u is not None,
            "HOW": flags[0],
            "HOW_U": flags[-1],
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
    )
    if parts is not None:
        sum_partials(parts, *outs)
    return pairs
