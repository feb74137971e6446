"""Quantization written a second time, in numpy and ml_dtypes, and what a linear makes of it in float64."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

FORMATS = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def quantized(x: Tensor, format: str, grain: Any, dim: int) -> Tensor:
    """float64 values of `x` after quantization with current scales.

    grain: None (as it is), "tensor", "row" (one scale along `dim`), or [rows, columns] of a block.
    """
    values = x.detach().float().numpy()
    if grain is None:
        return torch.from_numpy(values.astype(np.float64))
    dtype, largest = FORMATS[format]
    if grain == "tensor":
        amax = np.abs(values).max(keepdims=True)
    elif grain == "row":
        amax = np.abs(values).max(axis=dim, keepdims=True)
    else:
        amax = _block_amax(values, *grain)
    scale = np.maximum(amax.astype(np.float32), np.float32(1e-12)) / np.float32(largest)
    codes = np.clip(values * (np.float32(1) / scale), -largest, largest).astype(dtype)
    return torch.from_numpy(codes.astype(np.float64) * scale.astype(np.float64))


def _block_amax(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    amax = np.empty_like(values)
    for i in range(0, values.shape[-2], rows):
        for j in range(0, values.shape[-1], columns):
            block = (..., slice(i, i + rows), slice(j, j + columns))
            amax[block] = np.abs(values[block]).max(axis=(-2, -1), keepdims=True)
    return amax


def _turned(grain: Any) -> Any:
    return grain if grain is None or isinstance(grain, str) else grain[::-1]


class LinearReference:
    """Y = X W^T + b and its gradients, each as (value, product of magnitudes) in float64.

    A block r x c lies along the contraction of the output GEMM; for the gradient GEMM that contracts the other axis it is turned.
    """

    def __init__(self, x: Tensor, w: Tensor, b: Tensor, grad: Tensor, input: Any, weight: Any, grad_output: Any) -> None:
        self.x, self.w, self.b, self.grad = x.detach(), w.detach(), b.detach(), grad
        self.grains = input, weight, grad_output

    @cached_property
    def output(self) -> tuple[Tensor, Tensor]:
        x, w = quantized(self.x, "e4m3fn", self.grains[0], -1), quantized(self.w, "e4m3fn", self.grains[1], -1)
        return x @ w.mT + self.b.double(), x.abs() @ w.abs().mT + self.b.double().abs()

    @cached_property
    def grad_input(self) -> tuple[Tensor, Tensor]:
        flat = self.grad.reshape(-1, self.grad.shape[-1])
        dy, w = quantized(flat, "e5m2", self.grains[2], -1), quantized(self.w, "e4m3fn", _turned(self.grains[1]), 0)
        return (dy @ w).reshape(self.x.shape), (dy.abs() @ w.abs()).reshape(self.x.shape)

    @cached_property
    def grad_weight(self) -> tuple[Tensor, Tensor]:
        flat, x = self.grad.reshape(-1, self.grad.shape[-1]), self.x.reshape(-1, self.x.shape[-1])
        dy, x = quantized(flat, "e5m2", _turned(self.grains[2]), 0), quantized(x, "e4m3fn", _turned(self.grains[0]), 0)
        return dy.mT @ x, dy.abs().mT @ x.abs()

    @cached_property
    def grad_bias(self) -> tuple[Tensor, Tensor]:
        flat = self.grad.reshape(-1, self.grad.shape[-1]).double()
        return flat.sum(0), flat.abs().sum(0)
