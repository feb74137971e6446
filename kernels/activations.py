# mypy: allow-untyped-defs, allow-incomplete-defs
"""Activation functions and their derivatives on float32 tiles: silu, gelu (erf), gelu_tanh, relu; and what a gated MLP makes of them.

    forward    y  = act(h)           or act(h) * u
    backward   dh = dy * act'(h)     or dy * u * act'(h);      du = dy * act(h)

Each intermediate is rounded to h's dtype where the unfused operators round it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.layout import check_input
from fp8fx.kernels.quarters import load_quarter

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

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
        return _silu_derivative(h, sigmoid)
    elif ACT == 1:
        return 0.5 * (1.0 + tl.erf(h * _SQRT_HALF)) + h * tl.exp(-0.5 * h * h) * _INV_SQRT_2_PI
    elif ACT == 2:
        tanh = _tanh((h + h * h * h * _KAPPA) * _SQRT_2_OVER_PI)
        inner = (1.0 + h * h * (3.0 * _KAPPA)) * _SQRT_2_OVER_PI
        return 0.5 * (1.0 + tanh) + 0.5 * h * (1.0 - tanh * tanh) * inner
    else:
        return tl.where(h > 0.0, 1.0, 0.0)


@triton.jit
def _silu_derivative(h, sigmoid):
    return sigmoid * (1.0 + h * (1.0 - sigmoid))


@triton.jit
def _both(h, ACT: tl.constexpr):
    """act(h) and act'(h). One division serves both of silu's, so that act may differ from `activate` in its last bit."""
    if ACT == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        return h * sigmoid, _silu_derivative(h, sigmoid)
    else:
        return activate(h, ACT), _derivative(h, ACT)


@triton.jit
def forward(h_ptr, u_ptr, place, rows, columns, strides, strides_u, ACT: tl.constexpr, GATED: tl.constexpr):
    """y of some rows, float32 with the values that h's dtype holds; 0 outside of the matrix."""
    dtype = h_ptr.dtype.element_ty
    y = activate(load_quarter(h_ptr, place, rows, columns, strides), ACT).to(dtype).to(tl.float32)
    if GATED:
        y = (y * load_quarter(u_ptr, place, rows, columns, strides_u)).to(dtype).to(tl.float32)
    return y


@triton.jit
def backward(dy_ptr, h_ptr, u_ptr, place, rows, columns, strides_dy, strides, strides_u, ACT: tl.constexpr, GATED: tl.constexpr):
    """(dh, du) of some rows, float32 with the values that h's dtype holds; du is dh where there is no u."""
    dtype = h_ptr.dtype.element_ty
    h = load_quarter(h_ptr, place, rows, columns, strides)
    dy = load_quarter(dy_ptr, place, rows, columns, strides_dy)
    if GATED:
        u = load_quarter(u_ptr, place, rows, columns, strides_u)
        act, derivative = _both(h, ACT)
        du = (dy * act.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        dh = ((dy * u).to(dtype).to(tl.float32) * derivative).to(dtype).to(tl.float32)
        return dh, du
    else:
        dh = (dy * _derivative(h, ACT)).to(dtype).to(tl.float32)
        return dh, dh


def check_operands(where: str, dy: Tensor | None, h: Tensor, u: Tensor | None, activation: str) -> None:
    check_input(h, where)
    read = [x for x in (dy, h, u) if x is not None]
    if activation not in ACTIVATIONS:
        raise KernelError(f"{where}: no kernel for {activation!r}; there is one for {', '.join(ACTIVATIONS)}")
    if any(x.shape != h.shape or x.dtype != h.dtype for x in read):
        raise KernelError(f"{where}: dy, h and u must agree in shape and dtype, got {[(tuple(x.shape), x.dtype) for x in read]}")
