# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activations that write FP8: what feeds the second matrix product of an MLP, and what its backward feeds the first with.

    activation_cast            y  = act(h)            or act(h) * u             -> q, qT of y, amax(y)
    activation_backward_cast   dh = dy * act'(h)      or dy * u * act'(h)       -> q, qT of dh, amax(dh)
                               du =                      dy * act(h)            -> q, qT of du, amax(du)

act: silu, gelu (erf), gelu_tanh or relu; silu with u is SwiGLU. Each intermediate is rounded to h's dtype where the unfused operators
round it, so that codes differ from theirs only where the exponential's last bit does. One read of h, u and dy, in quarters (see
`quarters`); scales are given (delayed scaling, or none), since a tile cannot know the amax of the whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.amax import amax_of, merge_amax
from fp8fx.kernels.cast import NEAREST, Rounding
from fp8fx.kernels.codes import encode, hardware_format, random_tile
from fp8fx.kernels.layout import batches, check_input, transposed_shape
from fp8fx.kernels.quarters import byte_views, load_quarter, locate, store_quarter, store_transposed
from fp8fx.kernels.scale import inverse

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_CONFIG = (32, 128, 4)  # BLOCK_M, BLOCK_K, num_warps

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_KAPPA = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(h, ACT: tl.constexpr):
    """act(h) of float32 h."""
    if ACT == 0:
        return h / (1.0 + tl.exp(-h))
    elif ACT == 1:
        return h * 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
    elif ACT == 2:
        return 0.5 * h * (1.0 + _tanh((h + h * h * h * _KAPPA) * _SQRT_2_OVER_PI))
    else:
        return tl.where(h < 0.0, 0.0, h)  # NaN passes


@triton.jit
def _derivative(h, ACT: tl.constexpr):
    """act'(h) of float32 h."""
    if ACT == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        return sigmoid * (1.0 + h * (1.0 - sigmoid))
    elif ACT == 1:
        return 0.5 * (1.0 + tl.erf(h * _SQRT_HALF)) + h * tl.exp(-0.5 * h * h) * _INV_SQRT_2_PI
    elif ACT == 2:
        tanh = _tanh((h + h * h * h * _KAPPA) * _SQRT_2_OVER_PI)
        inner = (1.0 + h * h * (3.0 * _KAPPA)) * _SQRT_2_OVER_PI
        return 0.5 * (1.0 + tanh) + 0.5 * h * (1.0 - tanh * tanh) * inner
    else:
        return tl.where(h > 0.0, 1.0, 0.0)


@triton.jit
def _forward(h_ptr, u_ptr, place, rows, columns, strides, strides_u, ACT: tl.constexpr, GATED: tl.constexpr):
    """One quarter of y, float32 with the values that h's dtype holds."""
    dtype = h_ptr.dtype.element_ty
    y = activate(load_quarter(h_ptr, place, rows, columns, strides), ACT).to(dtype).to(tl.float32)
    if GATED:
        y = (y * load_quarter(u_ptr, place, rows, columns, strides_u)).to(dtype).to(tl.float32)
    return y


@triton.jit
def _backward(dy_ptr, h_ptr, u_ptr, place, rows, columns, strides_dy, strides, strides_u, ACT: tl.constexpr, GATED: tl.constexpr):
    """One quarter of (dh, du), float32 with the values that h's dtype holds; du is dh where there is no u."""
    dtype = h_ptr.dtype.element_ty
    h = load_quarter(h_ptr, place, rows, columns, strides)
    dy = load_quarter(dy_ptr, place, rows, columns, strides_dy)
    if GATED:
        u = load_quarter(u_ptr, place, rows, columns, strides_u)
        du = (dy * activate(h, ACT).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        dh = ((dy * u).to(dtype).to(tl.float32) * _derivative(h, ACT)).to(dtype).to(tl.float32)
        return dh, du
    else:
        dh = (dy * _derivative(h, ACT)).to(dtype).to(tl.float32)
        return dh, dh


@triton.jit
def write_result(y0, y1, y2, y3, into, random, place, at, inv, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, HOW: tl.constexpr):
    """Encode the quarters of one result, store q and qT and merge its amax; into = (q, qT, amax, M_WORDS), HOW as `_codes` says."""
    q_ptr, t_ptr, amax_ptr, M_WORDS = into
    rows, words, columns = at
    c0 = _codes(y0, random, place, rows, inv, HOW)
    c1 = _codes(y1, random, place, rows + 1, inv, HOW)
    c2 = _codes(y2, random, place, rows + 2, inv, HOW)
    c3 = _codes(y3, random, place, rows + 3, inv, HOW)
    if ROWS:
        store_quarter(q_ptr, c0, place, rows, columns)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if TRANSPOSED:
        store_transposed(t_ptr, c0, c1, c2, c3, place, rows, words, columns, M_WORDS, HOW[4])
    if HOW[5]:
        seen = tl.load(amax_ptr)
        merge_amax(amax_ptr, seen, amax_of(y0, y1, y2, y3))


@triton.jit
def _codes(y, random, place, rows, inv, HOW: tl.constexpr):
    """uint8 codes of one quarter; HOW = (E5M2, STOCHASTIC, NONFINITE, GROUPED, PACKED, AMAX, UNSCALED)."""
    b, _, tile_k, M, K = place
    bits = y.to(tl.int32, bitcast=True)
    if HOW[1]:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * y.shape[1], K, y.shape[0], y.shape[1], HOW[3])
    if HOW[6]:
        return encode(y, y, bits, HOW[0], HOW[1], HOW[2])
    else:
        return encode(y * inv, y, bits, HOW[0], HOW[1], HOW[2])


@triton.jit(do_not_specialize=["key", "key_u"])
def _activation_kernel(
    dy_ptr,
    h_ptr,
    u_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    amax_ptr,
    q_u_ptr,
    t_u_ptr,
    scale_u_ptr,
    amax_u_ptr,
    rng_ptr,
    key,
    key_u,
    M,
    K,
    M_WORDS,
    stride_db,
    stride_dm,
    stride_dk,
    stride_hb,
    stride_hm,
    stride_hk,
    stride_ub,
    stride_um,
    stride_uk,
    BACKWARD: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    at = (rows, words, columns)
    dys, hs, us = (stride_db, stride_dm, stride_dk), (stride_hb, stride_hm, stride_hk), (stride_ub, stride_um, stride_uk)
    inv = 1.0 if HOW[6] else inverse(tl.load(scale_ptr))
    into = (q_ptr, t_ptr, amax_ptr, M_WORDS)
    if BACKWARD:
        a0, b0 = _backward(dy_ptr, h_ptr, u_ptr, place, rows, columns, dys, hs, us, ACT, GATED)
        a1, b1 = _backward(dy_ptr, h_ptr, u_ptr, place, rows + 1, columns, dys, hs, us, ACT, GATED)
        a2, b2 = _backward(dy_ptr, h_ptr, u_ptr, place, rows + 2, columns, dys, hs, us, ACT, GATED)
        a3, b3 = _backward(dy_ptr, h_ptr, u_ptr, place, rows + 3, columns, dys, hs, us, ACT, GATED)
        if GATED:
            inv_u = 1.0 if HOW[6] else inverse(tl.load(scale_u_ptr))
            into_u = (q_u_ptr, t_u_ptr, amax_u_ptr, M_WORDS)
            write_result(b0, b1, b2, b3, into_u, (rng_ptr, key_u), place, at, inv_u, ROWS, TRANSPOSED, HOW)
    else:
        a0 = _forward(h_ptr, u_ptr, place, rows, columns, hs, us, ACT, GATED)
        a1 = _forward(h_ptr, u_ptr, place, rows + 1, columns, hs, us, ACT, GATED)
        a2 = _forward(h_ptr, u_ptr, place, rows + 2, columns, hs, us, ACT, GATED)
        a3 = _forward(h_ptr, u_ptr, place, rows + 3, columns, hs, us, ACT, GATED)
    write_result(a0, a1, a2, a3, into, (rng_ptr, key), place, at, inv, ROWS, TRANSPOSED, HOW)


Pair = tuple[Tensor | None, Tensor | None]


def flags(fp8: Format, how: Rounding, m: int, k: int, transposed: bool, amax: Tensor | None, scale: Tensor | None) -> tuple[bool, ...]:
    """HOW, as `_codes` reads it."""
    stochastic, nonfinite = how.rounding == "stochastic", how.overflow == "nonfinite"
    return fp8.name == "e5m2", stochastic, nonfinite, k % 4 == 0, transposed and m % 4 == 0, amax is not None, scale is None


def activation_cast(
    h: Tensor,
    u: Tensor | None,
    activation: str,
    format: str | Format,
    scale: Tensor | None = None,
    layout: str = "both",
    how: Rounding = NEAREST,
    amax: Tensor | None = None,
) -> Pair:
    """(q [..., M, K], qT [..., K, M]) of act(h), or act(h) * u; h and u bf16, fp16 or fp32 [..., M, K], any strides.

    scale: float32 with one element, or None; amax: float32 with one element, raised to amax(y).
    """
    return _launch(None, h, u, activation, format, (scale, None), layout, (how, how), (amax, None))[0]


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
) -> tuple[Pair, Pair]:
    """((q, qT) of dh, (q, qT) of du), the second (None, None) where u is None. Both scales or none; `how_u` may differ in its key only."""
    return _launch(dy, h, u, activation, format, (scale, scale_u), layout, (how, how_u or how), (amax, amax_u))


def _launch(
    dy: Tensor | None,
    h: Tensor,
    u: Tensor | None,
    activation: str,
    format: str | Format,
    scales: Pair,
    layout: str,
    hows: tuple[Rounding, Rounding],
    amaxes: Pair,
) -> tuple[Pair, Pair]:
    read = [x for x in (dy, h, u) if x is not None]
    check_input(h, "activation_cast")
    if activation not in ACTIVATIONS or any(x.shape != h.shape or x.dtype != h.dtype for x in read):
        raise KernelError(f"activation_cast: {activation!r} of tensors {[(tuple(x.shape), x.dtype) for x in read]}")
    two = dy is not None and u is not None
    if (two and (amaxes[0] is None) != (amaxes[1] is None)) or (two and (scales[0] is None) != (scales[1] is None)):
        raise KernelError("activation_backward_cast: scales and amaxes of dh and du come together")
    fp8, rows, transposed = hardware_format(format), layout != "transposed", layout != "rows"
    made: list[Pair] = [(None, None), (None, None)]
    for i in range(2 if two else 1):
        q = torch.empty(h.shape, dtype=fp8.torch_dtype, device=h.device) if rows else None
        made[i] = (q, torch.empty(transposed_shape(h.shape), dtype=fp8.torch_dtype, device=h.device) if transposed else None)
    if h.numel() == 0:
        return made[0], made[1]
    grids = [batches(h if x is None else x) for x in (dy, h, u)]
    count, m, k = grids[0].shape
    block_m, block_k, warps = _CONFIG
    pointers: list[Tensor] = []
    for pair, scale, amax in zip(made, scales, amaxes, strict=True):
        codes, _ = byte_views(h, *pair)
        pointers += [*codes, h if scale is None else scale, h if amax is None else amax.view(torch.int32)]
    how = hows[0]
    _activation_kernel[(count * triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
        *grids,
        *pointers,
        h if how.rng is None else how.rng,
        how.signed_key,
        hows[1].signed_key,
        m,
        k,
        m // 4,
        *(stride for grid in grids for stride in grid.stride()),
        BACKWARD=dy is not None,
        ACT=ACTIVATIONS[activation],
        GATED=u is not None,
        ROWS=rows,
        TRANSPOSED=transposed,
        HOW=flags(fp8, how, m, k, transposed, amaxes[0], scales[0]),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return made[0], made[1]
