"""What the oracle rounds, and how: the roles of a recipe's methods, and the products, lookups and outputs made of rounded tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from oracle_axes import BLOCKWISE, ROWWISE, AxisMethod, power_of_two_scale
from torch import Tensor

import fp8fx

E4M3FN, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LARGEST = {E4M3FN: 448.0, E5M2: 57344.0}


@dataclass(frozen=True)
class Role:
    """How one tensor is rounded. `scaled`: by its own amax. `saturate`: what is too large becomes the largest, else inf or NaN."""

    format: Any
    scaled: bool
    saturate: bool
    power_of_two: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded values of `x`, in its dtype."""
        codes, scale = self.codes(x)
        return codes * scale

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values on the format's grid and the scale they are multiplied with, both in the dtype of `x`."""
        largest = np.float32(LARGEST[self.format])
        values = x.detach().to(torch.float32).numpy()
        scale = np.float32(1)
        if self.scaled:
            finite = np.abs(values[np.isfinite(values)])
            amax = finite.max() if finite.size else np.float32(0)
            scale = np.maximum(amax, np.float32(1e-12)) / largest
            if self.power_of_two:
                scale = power_of_two_scale(amax, LARGEST[self.format])
        with np.errstate(all="ignore"):
            scaled = values * (np.float32(1) / scale)
            if self.saturate:
                scaled = np.where(np.isnan(scaled), scaled, np.clip(scaled, -largest, largest))
            codes = scaled.astype(self.format).astype(np.float32)
        return torch.from_numpy(codes).to(x.dtype), torch.tensor(scale, dtype=x.dtype)


@dataclass(frozen=True)
class Method:
    """One training method: a Role or None (not rounded) for each tensor of Y = X W^T, dX = dY W, dW = dY^T X."""

    input: Role
    weight: Role
    output: Role | None
    grad_output: Role
    grad_input: Role | None
    grad_weight: Role | None
    axes: AxisMethod | None = None  # of linears, matmuls and embeddings; the roles above are then those of convolutions


def _power_of_two(format: Any, saturate: bool = True) -> Role:
    return Role(format, scaled=True, saturate=saturate, power_of_two=True)


_FORWARD, _GRADIENT = Role(E5M2, scaled=False, saturate=True), Role(E5M2, scaled=False, saturate=False)
_SCALED = Role(E4M3FN, scaled=True, saturate=True)
_PER_TENSOR = (_power_of_two(E4M3FN), _power_of_two(E4M3FN), None, _power_of_two(E5M2, saturate=False), None, None)
METHODS = {
    "hybrid": Method(_SCALED, _SCALED, None, Role(E5M2, scaled=True, saturate=False), None, None),
    "direct": Method(_FORWARD, _FORWARD, _FORWARD, _GRADIENT, _GRADIENT, _GRADIENT),
    "rowwise": Method(*_PER_TENSOR, ROWWISE),
    "blockwise": Method(*_PER_TENSOR, BLOCKWISE),
}


def method_of(recipe: Any) -> Method:
    """The method a recipe starts from: one of METHODS, or any recipe whose defaults name a mode or a granularity of one."""
    defaults = fp8fx.Recipe.load(recipe).to_dict()["defaults"]
    blocks = (defaults.get("input") or {}).get("granularity", "tensor")
    return METHODS[defaults["mode"] if blocks == "tensor" else "rowwise" if blocks == "row" else "blockwise"]


class _Product(torch.autograd.Function):
    """Any bilinear product: forward at the rounded operands, backward with rounded dY at the same rounded operands.

    Codes are multiplied, and the product by the scales: in float32 too that rounds no operand a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor], roles: tuple[Role, Role], method: Method
    ) -> Tensor:
        (left, scale_left), (right, scale_right) = roles[0].codes(a), roles[1].codes(b)
        with torch.enable_grad():
            ctx.codes = (left.requires_grad_(), right.requires_grad_())
            ctx.result = product(*ctx.codes)
        ctx.scales, ctx.method = (scale_left, scale_right), method
        return ctx.result.detach() * (scale_left * scale_right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        method: Method = ctx.method
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        found: list[Tensor | None] = [None, None]
        with torch._C.DisableTorchFunction():  # the mode may still be on: what follows is the oracle's own arithmetic
            dy, scale = method.grad_output.codes(grad)
            grads = torch.autograd.grad(ctx.result, [ctx.codes[i] for i in wanted], dy, retain_graph=True)
            for i, g in zip(wanted, grads, strict=True):
                role = (method.grad_input, method.grad_weight)[i]
                g = g * (scale * ctx.scales[1 - i])
                found[i] = g if role is None else role(g)
        return (*found, None, None, None)


class _Lookup(torch.autograd.Function):
    """Rows of a rounded table; dY is rounded, then summed per row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, lookup: Callable[[Tensor], Tensor], method: Method) -> Tensor:
        with torch.enable_grad():
            ctx.table = method.weight(table).requires_grad_()
            ctx.result = lookup(ctx.table)
        ctx.method = method
        return ctx.result.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        method: Method = ctx.method
        with torch._C.DisableTorchFunction():
            dy, scale = method.grad_output.codes(grad)
            (summed,) = torch.autograd.grad(ctx.result, ctx.table, dy, retain_graph=True)
            summed = summed * scale
            return summed if method.grad_weight is None else method.grad_weight(summed), None, None


class _Output(torch.autograd.Function):
    """A rounded output; the gradient passes as it is, since dY is rounded where it enters the products."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, role: Role) -> Tensor:
        return role(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


rounded_product: Callable[..., Tensor] = _Product.apply
rounded_lookup: Callable[..., Tensor] = _Lookup.apply
rounded_output: Callable[..., Tensor] = _Output.apply
