# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activation functions and their derivatives on float32 tiles: silu, gelu (erf), gelu_tanh, relu; and what a gated MLP makes of them.

    forward    y  = act(h)           or act(h) * u
    backward   dh = dy * act'(h)     or dy * u * act'(h);      du = dy * act(h)

Each intermediate is rounded to h's dtype where the unfused operators round it. h and u may be `Kept` instead: e4m3fn codes with a power of
two per row of 128 columns. The dtype is that of the others then. Reference: torch's activations and
their gradients, `fp8fx.ops.act`; exponentials differ in their last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.codes import decode, encode, magnitude_of, ordered
from fp8fx.kernels.interpret import INTERPRET
from fp8fx.kernels.layout import cdiv, check_input
from fp8fx.kernels.quarters import load_quarter, store_quarter
from fp8fx.kernels.scale import finite_scale, inverse

SIDE = 128  # columns that share a scale of what is kept: the width of a tile of the kernels


class Kept(NamedTuple):
    """A tensor [..., M, K] as it is kept for backward: q uint8 of its shape, codes of e4m3fn, scale float32 [..., M, ceil(K / 128)]."""

    q: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, x: Tensor) -> Kept:
        """Room for what is kept of x."""
        scale = torch.empty((*x.shape[:-1], cdiv(x.shape[-1], SIDE)), dtype=torch.float32, device=x.device)
        return cls(torch.empty(x.shape, dtype=torch.uint8, device=x.device), scale)


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_KAPPA = tl.constexpr(0.044715)


# 1 / (1 + 2^t). What `exp` and `/` do for results below 2^-126 is left out: added to 1 they do not count, and a sigmoid that
# small is 0 here, so that silu is -0 below -87.3 instead of a number above -2^-119. That makes 4 instructions of 12.
_LOGISTIC = tl.constexpr("""{
    .reg .f32 t;
    ex2.approx.ftz.f32 t, $1;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 $0, t;
}""")
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logistic(t):
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp2(t))
    else:
        return tl.inline_asm_elementwise(_LOGISTIC, "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(h):
    return _logistic(h * -_LOG2_E)


@triton.jit
def _tanh_sigmoid(h):
    """sigmoid(y), y = 2 sqrt(2/pi) (h + 0.044715 h^3), of gelu_tanh(h) = h * sigmoid(y) = 0.5 * h * (1 + tanh(y / 2)).

    It loses nothing where tanh is close to -1.
    """
    FACTOR: tl.constexpr = -2.0 * _SQRT_2_OVER_PI * _LOG2_E
    return _logistic(h * (FACTOR + h * h * (FACTOR * _KAPPA)))


@triton.jit
def activate(h, ACT: tl.constexpr):
    """act(h) of float32 h."""
    if ACT == 0:
        return h * _sigmoid(h)
    elif ACT == 1:
        return h * 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
    elif ACT == 2:
        return h * _tanh_sigmoid(h)
    else:
        return tl.where(h < 0.0, 0.0, h)  # NaN passes


@triton.jit
def _derivative(h, ACT: tl.constexpr):
    """act'(h) of float32 h."""
    if ACT == 0:
        return _silu_derivative(h, _sigmoid(h))
    elif ACT == 1:
        return 0.5 * (1.0 + tl.erf(h * _SQRT_HALF)) + h * tl.exp(-0.5 * h * h) * _INV_SQRT_2_PI
    elif ACT == 2:
        sigmoid = _tanh_sigmoid(h)
        slope = (1.0 + h * h * (3.0 * _KAPPA)) * (2.0 * _SQRT_2_OVER_PI)
        return sigmoid * (1.0 + h * slope * (1.0 - sigmoid))
    else:
        return tl.where(h > 0.0, 1.0, 0.0)


@triton.jit
def _silu_derivative(h, sigmoid):
    return sigmoid * (1.0 + h * (1.0 - sigmoid))


@triton.jit
def _both(h, ACT: tl.constexpr):
    """act(h) and act'(h)."""
    if ACT == 0:
        sigmoid = _sigmoid(h)
        return h * sigmoid, _silu_derivative(h, sigmoid)
    else:
        return activate(h, ACT), _derivative(h, ACT)


# Two float32 to bfloat16 and back. The compiler rounds them one by one, where the exponential runs, at an eighth of the rate; but for
# products of two bfloat16 values, which it makes in one instruction for two.
_ROUND_PAIR = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xFFFF0000;
}""")


@triton.jit
def _rounded(y, DTYPE: tl.constexpr):
    """float32 of the values that `y` has in DTYPE."""
    if tl.bfloat16 == DTYPE and not INTERPRET:
        return tl.inline_asm_elementwise(_ROUND_PAIR, "=r,=r,r,r", [y], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return y.to(DTYPE).to(tl.float32)


@triton.jit
def _load(x_ptr, scale_ptr, place, rows, columns, strides, KEPT: tl.constexpr, DTYPE: tl.constexpr):
    """float32 of some rows of h or u, from codes if KEPT, with the values that DTYPE holds; 0 outside of the matrix."""
    if KEPT:
        b, _, _, M, K = place
        stride_b, stride_m, stride_k = strides
        at = b * stride_b + rows.to(tl.int64)[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_k
        codes = tl.load(x_ptr + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0)
        scale = tl.load(scale_ptr + _scale_at(place, rows, K, columns.shape[0]), mask=rows < M, other=1.0)
        return _rounded(decode(codes, False) * scale[:, None], DTYPE)
    else:
        return load_quarter(x_ptr, place, rows, columns, strides)


@triton.jit
def _scale_at(place, rows, K, WIDTH: tl.constexpr):
    b, _, tile_k, M, _ = place
    return (b * M + rows.to(tl.int64)) * tl.cdiv(K, 128) + tile_k * WIDTH // 128


@triton.jit
def keep(x, q_ptr, scale_ptr, place, rows, columns):
    """Write codes and scales of some rows of a tile of 128 columns; current scaling by powers of two."""
    _, _, _, M, K = place
    scale = finite_scale(magnitude_of(tl.max(ordered(x), 1)), 1e-12, 448.0, True)
    codes = encode(x * inverse(scale, True)[:, None], x, x.to(tl.int32, bitcast=True), False, False, False)
    store_quarter(q_ptr, codes, place, rows, columns)
    tl.store(scale_ptr + _scale_at(place, rows, K, 128), scale, mask=rows < M)


# inputs = (dy, h, u, scale of kept h, scale of kept u), all pointers; strides = a triple for each of dy, h and u;
# WHAT = (ACT, GATED, h is kept, u is kept).


@triton.jit
def forward(inputs, strides, place, rows, columns, WHAT: tl.constexpr):
    """(y, h, u) of some rows, float32 with the values that h's dtype holds; 0 outside of the matrix. u is h where there is none."""
    _, h_ptr, u_ptr, scale_h_ptr, scale_u_ptr = inputs
    dtype: tl.constexpr = u_ptr.dtype.element_ty if WHAT[2] else h_ptr.dtype.element_ty
    h = _load(h_ptr, scale_h_ptr, place, rows, columns, strides[1], WHAT[2], dtype)
    y = activate(h, WHAT[0])
    if WHAT[1]:
        u = _load(u_ptr, scale_u_ptr, place, rows, columns, strides[2], WHAT[3], dtype)
        y = (y.to(dtype).to(tl.float32) * u).to(dtype).to(tl.float32)  # one bfloat16 product of two, see `_rounded`
        return y, h, u
    else:
        return (y if WHAT[0] == 3 else _rounded(y, dtype)), h, h  # relu is exact, and keeps the sign of a NaN


@triton.jit
def backward(inputs, strides, place, rows, columns, WHAT: tl.constexpr):
    """(dh, du) of some rows, float32 with the values that dy's dtype holds; du is dh where there is no u."""
    dy_ptr, h_ptr, u_ptr, scale_h_ptr, scale_u_ptr = inputs
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    h = _load(h_ptr, scale_h_ptr, place, rows, columns, strides[1], WHAT[2], dtype)
    dy = load_quarter(dy_ptr, place, rows, columns, strides[0])
    if WHAT[1]:
        u = _load(u_ptr, scale_u_ptr, place, rows, columns, strides[2], WHAT[3], dtype)
        act, derivative = _both(h, WHAT[0])
        du = (dy * act.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        dh = _rounded((dy * u).to(dtype).to(tl.float32) * derivative, dtype)
        return dh, du
    else:
        dh = _rounded(dy * _derivative(h, WHAT[0]), dtype)
        return dh, dh


def check_operands(where: str, dy: Tensor | None, h: Tensor | Kept, u: Tensor | Kept | None, activation: str) -> Tensor:
    """The first of them in high precision, which has the shape and dtype of all. KernelError for what no kernel takes."""
    if activation not in ACTIVATIONS:
        raise KernelError(f"{where}: no kernel for {activation!r}; there is one for {', '.join(ACTIVATIONS)}")
    plain = [x for x in (dy, h, u) if isinstance(x, Tensor)]
    if not plain:
        raise KernelError(
            f"{where}: h and u are both codes: one of its inputs must be in high precision, whose dtype the result is rounded to"
        )
    first = plain[0]
    for x in plain:
        check_input(x, where)
    if any(x.shape != first.shape or x.dtype != first.dtype for x in plain):
        raise KernelError(f"{where}: dy, h and u must agree in shape and dtype, got {[(tuple(x.shape), x.dtype) for x in plain]}")
    for kept in (h, u):
        if isinstance(kept, Kept):
            _check_kept(where, kept, first.shape)
    return first


def _check_kept(where: str, x: Kept, shape: torch.Size) -> None:
    wanted = [*shape[:-1], cdiv(shape[-1], SIDE)]
    if x.q.shape != shape or x.q.dtype != torch.uint8 or x.scale.dtype != torch.float32 or list(x.scale.shape) != wanted:
        raise KernelError(
            f"{where}: kept codes must be uint8 {list(shape)} with float32 scales {wanted}, got {x.q.dtype} {list(x.q.shape)} with "
            f"{x.scale.dtype} {list(x.scale.shape)}"
        )
    if not x.scale.is_contiguous():
        raise KernelError(f"{where}: the scales of kept codes must be contiguous, got strides {x.scale.stride()}")


def pointers(first: Tensor, h: Tensor | Kept, u: Tensor | Kept | None) -> tuple[Tensor, Tensor]:
    """The scales of kept h and u, for the kernels' pointers; any tensor stands in where there is none."""
    return h.scale if isinstance(h, Kept) else first, u.scale if isinstance(u, Kept) else first


def values(x: Tensor | Kept | None) -> Tensor | None:
    return x.q if isinstance(x, Kept) else x
