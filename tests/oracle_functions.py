"""The torch functions that the oracle intercepts, each with what it computes instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from oracle_axes import BLOCKWISE, row_lookup
from oracle_rounding import rounded_lookup
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from oracle import Oracle


def _linear(oracle: Oracle, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return oracle.product("linear", input, weight, F.linear, bias)


def _matmul(op: str) -> Callable[..., Tensor]:
    def run(
        oracle: Oracle, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None, tensor2: Tensor | None = None
    ) -> Tensor:
        b = next(x for x in (other, mat2, tensor2) if x is not None)
        if input.dim() < 2 or b.dim() < 2:
            return torch.matmul(input, b)
        return oracle.product(op, input, b, torch.matmul)

    return run


def _addmm(oracle: Oracle, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and input.dim() == 1 and isinstance(mat2, nn.Parameter):
        return oracle.product("linear", mat1, mat2, torch.matmul, input)
    return beta * input + alpha * oracle.product("matmul", mat1, mat2, torch.matmul)


def _baddbmm(oracle: Oracle, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = alpha * oracle.product("bmm", batch1, batch2, torch.bmm)
    return product if beta == 0 else beta * input + product


def _convolution(op: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(oracle: Oracle, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        column = None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2))
        return oracle.product(op, input, weight, lambda x, w: function(x, w, None, *args, **kwargs), column)

    return run


def grouped_product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Each group of rows by its own matrix; `offs` holds where groups end, the last at the last row."""
    ends = [0, *offs.tolist()]
    return torch.cat([x[ends[e] : ends[e + 1]] @ w[e] for e in range(len(w))])


GROUPED = "transformers.grouped_mm_fallback"  # an operator, registered once transformers' experts are imported


def grouped_mm(oracle: Oracle, input: Tensor, mat2: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    return oracle.product("grouped_mm", input, mat2, lambda x, w: grouped_product(x, w, offs))


def _embedding(oracle: Oracle, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def lookup(table: Tensor) -> Tensor:
        return F.embedding(input, table, *args, **kwargs)

    method = oracle._method("embedding", weight)
    if method is None or method.axes is BLOCKWISE:
        return lookup(weight)
    return rounded_lookup(weight, lookup, method) if method.axes is None else row_lookup(weight, input, method.axes)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul("matmul"),
    Tensor.matmul: _matmul("matmul"),
    Tensor.__matmul__: _matmul("matmul"),
    Tensor.__rmatmul__: lambda oracle, b, a: _matmul("matmul")(oracle, a, b),
    torch.mm: _matmul("matmul"),
    Tensor.mm: _matmul("matmul"),
    torch.bmm: _matmul("bmm"),
    Tensor.bmm: _matmul("bmm"),
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch._grouped_mm: grouped_mm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    F.embedding: _embedding,
    **{getattr(torch, name): _convolution(name, getattr(torch, name)) for name in ("conv1d", "conv2d", "conv3d")},
    **{
        getattr(torch, name): _convolution(name, getattr(torch, name))
        for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    },
}
