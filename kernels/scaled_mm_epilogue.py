# mypy: allow-untyped-defs, allow-incomplete-defs
"""What scaled_mm does with a tile of scaled float32 sums before it leaves the multiprocessor.

    y = act(sums + bias)                                 act: none, silu, gelu (erf), gelu_tanh, relu
    record[0] = max(record[0], amax(y))                  over what lies inside of C
    out = y | codes(y / scale) | value(codes) * scale    one rounding to bf16, fp16 or fp32; FP8; or FP8's grid in bf16, fp16 or fp32

The constexpr tuple END says which, in the order of the names below. The random bits of stochastic rounding belong to the element's
row-major index in C, also where the kernel computes C^T (TURNED).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fp8fx.formats import Format
from fp8fx.kernels.activations import ACTIVATIONS, activate
from fp8fx.kernels.codes import encode, finite_magnitude, largest_of, on_grid
from fp8fx.kernels.random_bits import random_at, random_tile
from fp8fx.kernels.records import amax_bits, merge_amax
from fp8fx.kernels.rounding import Rounding
from fp8fx.kernels.scale import inverse

BIAS = tl.constexpr(0)  # 0 none, 1 one per column of the tile, 2 one per row
ACT = tl.constexpr(1)  # -1 none, else as ACTIVATIONS says
OUT = tl.constexpr(2)  # 0 values, 1 codes, 2 values of codes
E5M2 = tl.constexpr(3)
STOCHASTIC = tl.constexpr(4)
NONFINITE = tl.constexpr(5)
SCALED = tl.constexpr(6)
RECORD = tl.constexpr(7)
TURNED = tl.constexpr(8)
GROUPED = tl.constexpr(9)


@dataclass(frozen=True)
class End:
    """What ends a tile: bias, activation, and the FP8 rounding of the output to `format`, in codes or in values; see `scaled_mm`."""

    bias: Tensor | None
    activation: str | None
    format: Format | None
    codes: bool
    scale: Tensor | None
    how: Rounding
    record: Tensor | None

    def constexpr(self, turned: bool, columns: int) -> tuple[object, ...]:
        """END; `columns` of C as the kernel sees it."""
        return (
            0 if self.bias is None else 2 if turned else 1,
            -1 if self.activation is None else ACTIVATIONS[self.activation],
            0 if self.format is None else 1 if self.codes else 2,
            self.format is not None and self.format.name == "e5m2",
            self.format is not None and self.how.stochastic,
            self.how.nonfinite,
            self.scale is not None,
            self.record is not None,
            turned,
            columns % 4 == 0,
        )

    def arguments(self, anything: Tensor) -> tuple[Tensor | int, ...]:
        pointers = (self.bias, self.scale, self.record, self.how.rng)
        return (*(anything if part is None else part for part in pointers), self.how.signed_key)


@triton.jit
def ended(part, rows, columns, ends, M, N, END: tl.constexpr):
    """y of the scaled sums in these rows and columns (int32 [], one axis each) of a batch; raises the record."""
    bias_ptr, _, record_ptr, _, _ = ends
    if END[BIAS] == 1:
        part += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if END[BIAS] == 2:
        part += tl.load(bias_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if END[ACT] >= 0:
        part = activate(part, END[ACT])
    if END[RECORD]:
        # Rows beyond the last may belong to the next batch.
        magnitude = tl.where((rows < M)[:, None] & (columns < N)[None, :], finite_magnitude(part), 0.0)
        merge_amax(record_ptr, amax_bits(record_ptr), largest_of(magnitude))
    return part


@triton.jit
def rounded(part, bits, ends, END: tl.constexpr, DTYPE: tl.constexpr):
    """What C holds of y; `bits` uint32 [...] are read where rounding is stochastic."""
    _, out_scale_ptr, _, _, _ = ends
    if END[OUT] == 0:
        out = part.to(DTYPE)
    else:
        scale = tl.load(out_scale_ptr) if END[SCALED] else 1.0
        y = part * inverse(scale) if END[SCALED] else part
        if END[OUT] == 1:
            out = encode(y, part, bits, END[E5M2], END[STOCHASTIC], END[NONFINITE]).to(DTYPE, bitcast=True)
        else:
            out = (on_grid(y, part, bits, END[E5M2], END[STOCHASTIC], END[NONFINITE]) * scale).to(DTYPE)
    return out


@triton.jit
def _finish(c, part, ends, place, column, strides, END: tl.constexpr, TMA_STORE: tl.constexpr, DTYPE: tl.constexpr):
    """Finish and store one part."""
    batch, row, M, N = place
    stride_cb, stride_cm, stride_cn = strides
    rows = row + tl.arange(0, part.shape[0])
    columns = column + tl.arange(0, part.shape[1])
    part = ended(part, rows, columns, ends, M, N, END)
    bits = part.to(tl.int32, bitcast=True)
    if END[STOCHASTIC]:
        bits = _bits((ends[3], ends[4]), batch.to(tl.int64), rows, columns, column, M, N, part.shape[0], part.shape[1], END)
    out = rounded(part, bits, ends, END, DTYPE)
    if TMA_STORE:
        c.store([batch * M + row, column], out)
    else:
        at = batch.to(tl.int64) * stride_cb + rows.to(tl.int64)[:, None] * stride_cm + columns.to(tl.int64)[None, :] * stride_cn
        tl.store(c + at, out, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _bits(random, batch, rows, columns, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, END: tl.constexpr):
    """The random bits of a tile."""
    if END[TURNED]:
        return random_at(random, (batch * N + columns)[None, :] * M + rows[:, None])
    else:
        return random_tile(random, batch * M + rows, column, N, BLOCK_M, BLOCK_N, END[GROUPED])


@triton.jit
def _halves(part):
    """The left and the right half of a tile; every thread holds both."""
    return part.reshape(part.shape[0], 2, part.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish_two(c, part, ends, place, column, strides, END: tl.constexpr, TMA_STORE: tl.constexpr, DTYPE: tl.constexpr):
    left, right = _halves(part)
    _finish(c, left, ends, place, column, strides, END, TMA_STORE, DTYPE)
    _finish(c, right, ends, place, column + left.shape[1], strides, END, TMA_STORE, DTYPE)


@triton.jit
def finish(c, part, ends, place, column, strides, END: tl.constexpr, TMA_STORE: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr):
    """Finish and store `part`, the scaled sums of the rows from `row` and the columns from `column` on, in 1, 2 or 4 parts.

    place = (batch, row, M, N); ends = (bias pointer, out_scale pointer, record pointer, rng pointer, key); strides of C. Parts need
    half or a quarter of the registers, and of the shared memory for the output.
    """
    if PARTS == 1:
        _finish(c, part, ends, place, column, strides, END, TMA_STORE, DTYPE)
    elif PARTS == 2:
        _finish_two(c, part, ends, place, column, strides, END, TMA_STORE, DTYPE)
    else:
        left, right = _halves(part)
        _finish_two(c, left, ends, place, column, strides, END, TMA_STORE, DTYPE)
        _finish_two(c, right, ends, place, column + left.shape[1], strides, END, TMA_STORE, DTYPE)
