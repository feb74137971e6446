# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the fused kernels (activations, norms) end with: one result y, under one scale, written as FP8 in both layouts.

    q, qT    codes of y * (1 / scale), or of y itself
    scale    given; or made here from the amax of y that another kernel measured: then the first program stores it
    record   amax and counts of y (see `records`)
    sums     of y over the rows of each tile (see `column_sums`)

A result's pointers are `into` = (q, qT, scale, made scale, record, sums), in this order among a kernel's arguments. What is done with
them is the constexpr tuple HOW, in the order of the names below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.codes import encode
from fp8fx.kernels.column_sums import store_partial
from fp8fx.kernels.layout import Matrices, empty_transposed
from fp8fx.kernels.quarters import store_quarter, store_transposed
from fp8fx.kernels.random_bits import random_tile
from fp8fx.kernels.records import amax_bits, amax_of, count_zeros, merge_amax
from fp8fx.kernels.rounding import Rounding
from fp8fx.kernels.scale import compute_scale, current_scale, inverse, largest_part

Pair = tuple[Tensor | None, Tensor | None]
LAYOUTS = ("rows", "transposed", "both")

E5M2 = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
NONFINITE = tl.constexpr(2)
GROUPED = tl.constexpr(3)
ROWS = tl.constexpr(4)
TRANSPOSED = tl.constexpr(5)
SCALED = tl.constexpr(6)  # False: y itself is rounded
PARTS = tl.constexpr(7)  # 0: the scale is given; else it is made from so many partial amaxes
POWER_OF_TWO = tl.constexpr(8)
EPS = tl.constexpr(9)
RECORD = tl.constexpr(10)  # 0 none, 1 amax, 2 amax and counts
SUMS = tl.constexpr(11)  # 0 none, else how many sets of partial sums the launch leaves
AND_AMAX = tl.constexpr(12)  # the amax is stored too, so many elements behind the scale that was made from it; 0: it is not


@triton.jit
def tensor_inverse(into, HOW: tl.constexpr):
    """1 / scale of a result. Where the scale is made here, the first program stores it and records the amax."""
    _, _, scale_ptr, made_ptr, record_ptr, _ = into
    if not HOW[SCALED]:
        return 1.0
    elif HOW[PARTS] == 0:
        return inverse(tl.load(scale_ptr))
    else:
        amax = largest_part(scale_ptr, HOW[PARTS])
        scale = current_scale(amax, HOW[EPS], 57344.0 if HOW[E5M2] else 448.0, HOW[POWER_OF_TWO])
        if tl.program_id(0) == 0:
            tl.store(made_ptr, scale)
            if HOW[AND_AMAX]:
                tl.store(made_ptr + HOW[AND_AMAX], amax)
            if HOW[RECORD]:
                merge_amax(record_ptr, amax_bits(record_ptr), amax)
        return inverse(scale)


@triton.jit
def write_result(y0, y1, y2, y3, into, random, place, at, inv, BLOCK_M: tl.constexpr, HOW: tl.constexpr):
    """Encode the quarters of a tile of y and write them; outside of the matrix y must be 0. at = (rows, words, columns)."""
    q_ptr, t_ptr, _, _, record_ptr, sums_ptr = into
    rows, words, columns = at
    c0 = _codes(y0, random, place, rows, inv, HOW)
    c1 = _codes(y1, random, place, rows + 1, inv, HOW)
    c2 = _codes(y2, random, place, rows + 2, inv, HOW)
    c3 = _codes(y3, random, place, rows + 3, inv, HOW)
    # What reads y comes first: from then on only its codes take registers.
    if HOW[SUMS]:
        store_partial(sums_ptr, (y0 + y1) + (y2 + y3), place, columns, BLOCK_M, HOW[SUMS])
    if HOW[RECORD] and HOW[PARTS] == 0:
        seen = amax_bits(record_ptr)
        merge_amax(record_ptr, seen, amax_of(y0, y1, y2, y3))
    if HOW[RECORD] == 2:
        count_zeros(record_ptr, y0, y1, y2, y3, c0, c1, c2, c3, place, BLOCK_M)
    if HOW[ROWS]:
        store_quarter(q_ptr, c0, place, rows, columns)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if HOW[TRANSPOSED]:
        store_transposed(t_ptr, c0, c1, c2, c3, place, words, columns)


@triton.jit
def _codes(y, random, place, rows, inv, HOW: tl.constexpr):
    """uint8 codes of one quarter."""
    b, _, tile_k, M, K = place
    bits = y.to(tl.int32, bitcast=True)
    if HOW[STOCHASTIC]:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * y.shape[1], K, y.shape[0], y.shape[1], HOW[GROUPED])
    if HOW[SCALED]:
        return encode(y * inv, y, bits, HOW[E5M2], HOW[STOCHASTIC], HOW[NONFINITE])
    else:
        return encode(y, y, bits, HOW[E5M2], HOW[STOCHASTIC], HOW[NONFINITE])


@dataclass(frozen=True)
class Scaling:
    """Where the scale of a result comes from: None, given, or `from_amax`, the largest of the elements of `scale` being the amax of y.

    made: where the scale made from an amax goes, float32 with one element; of two, the second gets the amax.
    """

    scale: Tensor | None = None
    from_amax: bool = False
    made: Tensor | None = None
    power_of_two: bool = False
    eps: float = 1e-12

    def check(self, where: str) -> None:
        if self.scale is None:
            if self.from_amax:
                raise KernelError(f"{where}: from_amax makes the scale from an amax: pass it as scale")
            return
        n = self.scale.numel()
        if self.scale.dtype != torch.float32 or not (n == 1 or (self.from_amax and self.scale.is_contiguous() and n & (n - 1) == 0 < n)):
            allowed = "1 elements, an amax, or a power of two of partial ones" if self.from_amax else "1 elements"
            raise KernelError(f"{where}: scale must be float32 with {allowed}, got {self.scale.dtype} of shape {tuple(self.scale.shape)}")
        if self.from_amax and (self.made is None or self.made.dtype != torch.float32 or not 1 <= self.made.numel() <= 2):
            raise KernelError(f"{where}: from_amax needs made_scale, float32 with one element (or two: and the amax), for what it makes")

    @property
    def parts(self) -> int:
        return self.scale.numel() if self.from_amax and self.scale is not None else 0

    @property
    def and_amax(self) -> int:
        """How far behind the scale the amax goes; 0 if nowhere."""
        return self.made.stride(0) if self.made is not None and self.made.numel() == 2 else 0

    def of_nothing(self, format: Format) -> None:
        """What a kernel would store of the scale of an empty tensor."""
        if self.from_amax and self.scale is not None and self.made is not None:
            amax = self.scale.max()
            scale = compute_scale(amax, format, self.power_of_two, self.eps)
            self.made.copy_(torch.stack([scale, amax]) if self.and_amax else scale.view(self.made.shape))


@dataclass(frozen=True)
class Result:
    """One result of a launch: its codes, None where not asked for, and what else is written."""

    q: Tensor | None
    t: Tensor | None
    scaling: Scaling
    record: Tensor | None = None
    sums: Tensor | None = None

    @classmethod
    def empty(
        cls, x: Tensor, format: Format, layout: str, scaling: Scaling, record: Tensor | None = None, sums: Tensor | None = None
    ) -> Result:
        """Room for the codes of a tensor of x's shape."""
        if layout not in LAYOUTS:
            raise KernelError(f"unknown layout {layout!r}; allowed: rows, transposed or both")
        q = torch.empty(x.shape, dtype=format.torch_dtype, device=x.device) if layout != "transposed" else None
        t = empty_transposed(x.shape, format.torch_dtype, x) if layout != "rows" else None
        return cls(q, t, scaling, record, sums)

    @property
    def pair(self) -> Pair:
        return self.q, self.t

    def pointers(self, anything: Tensor) -> tuple[Tensor, ...]:
        parts = (self.q, self.t, self.scaling.scale, self.scaling.made, self.record, self.sums)
        return tuple(anything if part is None else part for part in parts)

    def how(self, format: Format, how: Rounding, x: Matrices, record: int) -> tuple[object, ...]:
        """HOW of the kernel that writes it."""
        scaling = self.scaling
        return (
            format.name == "e5m2",
            how.stochastic,
            how.nonfinite,
            x.k % 4 == 0,
            self.q is not None,
            self.t is not None,
            scaling.scale is not None,
            scaling.parts,
            scaling.power_of_two,
            scaling.eps,
            record,
            0 if self.sums is None else self.sums.stride(0) // x.k,
            scaling.and_amax,
        )
