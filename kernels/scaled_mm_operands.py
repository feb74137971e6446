"""The operands of scaled_mm as its kernels read them: codes with K innermost, rows on multiples of 16 bytes, and their scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.layout import cdiv


@dataclass(frozen=True)
class Operand:
    """One operand as the kernel reads it: codes [rows of all batches, K] with K innermost, and its scales over [batch, rows, K]."""

    codes: Tensor
    rows: int  # of one batch
    batch_rows: int  # from one batch to the next; 0 where one matrix serves all
    scale: Tensor
    block: tuple[int, int] | None

    @classmethod
    def of(cls, x: Tensor, batch: torch.Size, scale: Tensor, block: tuple[int, int] | None) -> Operand:
        """`x` [..., R, K] with `scale` in the same orientation."""
        if x.dim() == 2 and scale.numel() == 1 and scale.dtype == torch.float32 and _readable(x):
            return cls(x, x.shape[0], 0, scale, block)
        shared = math.prod(x.shape[:-2]) == 1
        if not shared:
            x = x.expand(*batch, *x.shape[-2:])
        flat = x.reshape(-1, *x.shape[-2:])
        rows, k = flat.shape[1:]
        if scale.dtype != torch.float32:
            raise KernelError(f"scaled_mm: scales must be float32, got {scale.dtype}")
        if scale.numel() != 1:
            wanted = (rows, 1) if block is None else (cdiv(rows, block[0]), cdiv(k, block[1]))
            if tuple(scale.shape[-2:]) != wanted:
                raise KernelError(
                    f"scaled_mm: scale of shape {tuple(scale.shape)} for {rows} rows of {k}, block {block}: expected {wanted}"
                )
            scale = scale.expand(*batch, *wanted).reshape(-1, *wanted)
            if block is None:  # found by its number, not by strides
                scale = scale.contiguous()
        return cls(_stacked(flat), rows, 0 if shared else rows, scale, block)

    @property
    def per_row(self) -> bool:
        return self.block is None and self.scale.numel() != 1

    def strides(self) -> tuple[int, int, int]:
        """Of the scales, by batch, row (or block of rows) and block of K; 0 where one scale serves all."""
        if self.scale.numel() == 1:
            return 0, 0, 0
        by_batch, by_row, by_k = self.scale.stride()
        return (by_batch if self.scale.shape[0] > 1 else 0), by_row, (0 if self.block is None else by_k)


def _readable(x: Tensor) -> bool:
    """Whether the copy engine can read [R, K] as it lies."""
    by_row, by_k = x.stride()
    return by_k == 1 and by_row % 16 == 0 and by_row >= x.shape[1] and x.data_ptr() % 16 == 0


def _stacked(x: Tensor) -> Tensor:
    """[B, R, K] as [B * R, K] that the copy engine can read: stride 1 along K, rows and start on multiples of 16 bytes."""
    count, rows, k = x.shape
    by_batch, by_row, by_k = x.stride()
    aligned = (by_k == 1 or k == 1) and (by_row % 16 == 0 or rows == 1) and by_row >= k and x.data_ptr() % 16 == 0
    if aligned and (count == 1 or by_batch == rows * by_row):
        pitch = by_row if rows > 1 or count > 1 else cdiv(k, 16) * 16
        if pitch % 16 == 0:
            return x.as_strided((count * rows, k), (pitch, 1))
    padded = torch.empty((count * rows, cdiv(k, 16) * 16), dtype=x.dtype, device=x.device)
    padded.view(torch.uint8)[:, :k].view(count, rows, k).copy_(x.view(torch.uint8))
    return padded[:, :k]
