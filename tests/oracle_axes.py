"""The oracle's side of scales per row and per block: which tensor has which scales in which GEMM, in numpy and ml_dtypes.

    row        one scale for all elements along the contracted axis: X [M, K] has M of them in Y = X W^T, and K in dW = dY^T X
    (r, c)     one scale for c elements along the contracted axis by r along the other one; blocks at the edges are smaller

The same tensor is therefore rounded twice where two GEMMs contract different axes of it. Scales are powers of two,

    scale = 1 / 2^floor(log2(max / max(amax, 1e-12)))

so that a dequantized value is exact in float32, and a product of dequantized values needs no second thought about where to scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

E4M3FN = ml_dtypes.float8_e4m3fn
Blocks = str | tuple[int, int]


def power_of_two_scale(amax: np.ndarray[Any, Any], largest: float) -> np.ndarray[Any, Any]:
    """float32; frexp gives quotient = m * 2^e with m in [0.5, 1), so that floor(log2 quotient) is e - 1."""
    quotient = np.float32(largest) / np.maximum(amax.astype(np.float32), np.float32(1e-12))
    _, exponent = np.frexp(quotient)
    return np.ldexp(np.ones_like(quotient), 1 - exponent).astype(np.float32)


@dataclass(frozen=True)
class AxisRole:
    """How one tensor is rounded: `blocks` is "row" or (r, c). `saturate`: as in oracle.Role."""

    blocks: Blocks
    saturate: bool
    format: Any = E4M3FN

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """The rounded values of `x`, in its dtype, for a GEMM that contracts `axis` (-1 or -2)."""
        codes, scale = self.codes(x, axis)
        return torch.from_numpy(codes.astype(np.float32) * self.spread(scale, x, axis)).to(x.dtype)

    def codes(self, x: Tensor, axis: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Codes in the format's own dtype and the float32 scales: 1 along `axis` for rows, one per block for blocks."""
        values = x.detach().to(torch.float32).numpy()
        largest = float(ml_dtypes.finfo(self.format).max)
        scale = power_of_two_scale(self._amax(np.where(np.isfinite(values), np.abs(values), 0), axis), largest)
        scaled = values / self.spread(scale, x, axis)
        if self.saturate:
            scaled = np.where(np.isnan(scaled), scaled, np.clip(scaled, -largest, largest))
        with np.errstate(all="ignore"):
            return scaled.astype(self.format), scale

    def _amax(self, magnitude: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
        if self.blocks == "row":
            return magnitude.max(axis=axis, keepdims=True, initial=0)
        high, wide = self._block(axis)
        by_row = np.maximum.reduceat(magnitude, np.arange(0, magnitude.shape[-2], high), axis=-2)
        return np.maximum.reduceat(by_row, np.arange(0, magnitude.shape[-1], wide), axis=-1)

    def _block(self, axis: int) -> tuple[int, int]:
        """Rows and columns of a block of the tensor as it lies."""
        assert not isinstance(self.blocks, str)
        across, along = self.blocks
        return (across, along) if axis == -1 else (along, across)

    def spread(self, scale: np.ndarray[Any, Any], x: Tensor, axis: int) -> np.ndarray[Any, Any]:
        """The scale of each element."""
        if self.blocks == "row":
            return np.broadcast_to(scale, tuple(x.shape))
        high, wide = self._block(axis)
        return scale.repeat(high, axis=-2).repeat(wide, axis=-1)[..., : x.shape[-2], : x.shape[-1]]


@dataclass(frozen=True)
class AxisMethod:
    """The three tensors of Y = X W^T, dX = dY W, dW = dY^T X that are rounded per row or block."""

    input: AxisRole
    weight: AxisRole
    grad_output: AxisRole


ROWWISE = AxisMethod(AxisRole("row", True), AxisRole("row", True), AxisRole("row", False))
BLOCKWISE = AxisMethod(AxisRole((1, 128), True), AxisRole((128, 128), True), AxisRole((1, 128), False))


class _AxisProduct(torch.autograd.Function):
    """A [..., M, K] times B [..., K, N]; each of the three GEMMs has operands rounded for the axis that it contracts."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, roles: tuple[AxisRole, AxisRole], grad: AxisRole) -> Tensor:
        ctx.operands, ctx.roles, ctx.grad = (a.detach(), b.detach()), roles, grad
        return torch.matmul(roles[0](a, -1), roles[1](b, -2))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (a, b), (left, right) = ctx.operands, ctx.roles
        da = db = None
        with torch._C.DisableTorchFunction():
            if ctx.needs_input_grad[0]:
                da = torch.matmul(ctx.grad(dy, -1), right(b, -1).mT).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]:
                db = torch.matmul(left(a, -2).mT, ctx.grad(dy, -2)).sum_to_size(b.shape)
        return da, db, None, None


def axis_product(a: Tensor, b: Tensor, method: AxisMethod, tokens: bool, activations: bool) -> Tensor:
    """a [..., M, K] times b [..., K, N]. tokens: all of a's leading dimensions are one axis, which dB contracts, as in a linear.

    activations: `b` has the role of an input too, not that of a weight.
    """
    roles = (method.input, method.input if activations else method.weight)
    left = a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) if tokens else a
    y: Tensor = _AxisProduct.apply(left, b, roles, method.grad_output)  # type: ignore[no-untyped-call]
    return y.reshape(*a.shape[:-1], b.shape[-1]) if tokens else y


class _RowLookup(torch.autograd.Function):
    """Rows of a table, each with a scale of its own; dY is rounded per token, then summed per row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, method: AxisMethod) -> Tensor:
        ctx.index, ctx.shape, ctx.method = index, table.shape, method
        return method.weight(table, -1)[index]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with torch._C.DisableTorchFunction():
            rounded = ctx.method.grad_output(dy, -1)
            summed = rounded.new_zeros(ctx.shape).index_add_(0, ctx.index.flatten(), rounded.flatten(0, -2))
        return summed, None, None


def row_lookup(table: Tensor, index: Tensor, method: AxisMethod) -> Tensor:
    return _RowLookup.apply(table, index, method)  # type: ignore[no-any-return,no-untyped-call]
