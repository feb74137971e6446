# mypy: allow-untyped-defs, allow-incomplete-defs
"""arithmetic_mm: a matrix product step by step, each product and each sum rounded, for studies of arithmetic on a GPU.

    acc = Q_sums(acc + Q_products(multiply(a_k, b_k)))      k ascending; the steps of `fp8fx.arithmetic.tiles`, with the same bits

Operands come split and K first, as `fp8fx.arithmetic.operands` makes them: values [K, M] and [K, N] and, but for an exact multiplier, a
second tensor of the same shape. A program keeps a tile of sums in registers and reads one column of A and one row of B per step; Mitchell's
product is computed, a table is looked up in memory, where its few lines stay in the L1 cache. There is no matrix instruction here: that is
what is being studied. Multiplications and additions are not fused (enable_fp_fusion), since each is rounded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format

EXACT, MITCHELL, TABLE = 0, 1, 2
KINDS = {"exact": EXACT, "mitchell": MITCHELL, "table": TABLE}
MODES = ("nearest_even", "nearest_away", "toward_zero", "up", "down")
BLOCK_M, BLOCK_N = 64, 64

# Places in the constexpr tuple that says how a value is rounded.
HOW, BITS, EMIN, MAX, MODE, SATURATE, HAS_INF = (tl.constexpr(i) for i in range(7))
_NOT, _BY_BITS, _BY_STEPS = (tl.constexpr(i) for i in range(3))
_EXACT, _MITCHELL = tl.constexpr(EXACT), tl.constexpr(MITCHELL)
_INSTRUCTION = tl.constexpr(32)


@dataclass(frozen=True)
class Grid:
    """What values are rounded to: a format, and how. `float32` rounds nothing."""

    format: Format
    rounding: str = "nearest_even"
    overflow: str = "nonfinite"

    def __post_init__(self) -> None:
        if self.rounding not in MODES:
            raise KernelError(f"arithmetic_mm rounds {', '.join(MODES)}, got {self.rounding!r}")

    @property
    def supported(self) -> bool:
        """The kernel has this grid: a mantissa to round ties in, and a signed zero."""
        return self.format.mantissa_bits > 0 and self.format.signed_zero

    @property
    def constexpr(self) -> tuple[int | float, ...]:
        f = self.format
        how = 0 if f.mantissa_bits == 23 else 1 if f.exponent_bits == 8 else 2
        return how, f.mantissa_bits, f.emin, f.max, MODES.index(self.rounding), int(self.overflow == "saturate"), int(f.has_inf)


@triton.jit
def _power(bits):
    """The float32 with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _by_bits(x, GRID: tl.constexpr):
    """A format with float32's exponent: what is added below the step carries into it, and into the exponent."""
    BELOW: tl.constexpr = 23 - GRID[BITS]
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if GRID[MODE] == 0:
        magnitude += ((magnitude >> BELOW) & 1) + ((1 << (BELOW - 1)) - 1)
    elif GRID[MODE] == 1:
        magnitude += 1 << (BELOW - 1)
    elif GRID[MODE] == 3:
        magnitude += tl.where(x > 0.0, (1 << BELOW) - 1, 0)
    elif GRID[MODE] == 4:
        magnitude += tl.where(x < 0.0, (1 << BELOW) - 1, 0)
    y = _power(magnitude & -(1 << BELOW))
    if GRID[SATURATE]:
        y = tl.minimum(y, GRID[MAX])
    return y


@triton.jit
def _by_steps(x, GRID: tl.constexpr):
    """|x| = (k + r) steps of its binade, and the mode says whether it becomes k + 1."""
    a = tl.minimum(tl.abs(x), 4.0 * GRID[MAX])
    exponent = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, (GRID[EMIN] + 127) << 23)
    STEPS: tl.constexpr = 2.0 ** GRID[BITS]
    t = a * _power((254 << 23) - exponent) * STEPS
    k = tl.floor(t)
    r = t - k
    if GRID[MODE] == 0:
        up = (r > 0.5) | ((r == 0.5) & (k * 0.5 != tl.floor(k * 0.5)))
    elif GRID[MODE] == 1:
        up = r >= 0.5
    elif GRID[MODE] == 2:
        up = r < 0.0
    elif GRID[MODE] == 3:
        up = (r > 0.0) & (x > 0.0)
    else:
        up = (r > 0.0) & (x < 0.0)
    y = tl.where(up, k + 1.0, k) * _power(exponent - (GRID[BITS] << 23))
    beyond = y > GRID[MAX]
    largest = tl.full(x.shape, GRID[MAX], tl.float32)
    over = tl.full(x.shape, float("inf") if GRID[HAS_INF] else float("nan"), tl.float32)
    finite = tl.abs(x) < float("inf")
    if GRID[SATURATE]:
        over = largest
    elif GRID[MODE] == 2:
        over = tl.where(finite, largest, over)
    elif GRID[MODE] == 3:
        over = tl.where(finite & (x < 0.0), largest, over)
    elif GRID[MODE] == 4:
        over = tl.where(finite & (x > 0.0), largest, over)
    return tl.where(beyond, over, y)


@triton.jit
def _round(x, GRID: tl.constexpr):
    """float32 `x` on the grid; NaN passes, and signs stay."""
    y = x
    if GRID[HOW] != _NOT:
        magnitude = _by_bits(x, GRID) if GRID[HOW] == _BY_BITS else _by_steps(x, GRID)
        sign = x.to(tl.int32, bitcast=True) >> 31 << 31
        signed = _power((magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign)
        y = tl.where(x == x, signed, x)
    return y


@triton.jit
def _whole(x):
    """`x` cut to an integer."""
    return tl.where(x < 0.0, -tl.floor(-x), tl.floor(x))


@triton.jit
def _instruction(acc, a, a_power, b, b_power, count, in_m, in_n, M, N):
    """One FP8 instruction of Hopper, as `fp8fx.arithmetic.tiles` models it: `count` steps from these pointers on."""
    largest = tl.maximum(_power(acc.to(tl.int32, bitcast=True) & 0x7F800000), 7.888609052210118e-31)  # 2^-100
    for _ in range(count):
        p = tl.load(a_power, mask=in_m, other=0.0)
        q = tl.load(b_power, mask=in_n, other=0.0)
        largest = tl.maximum(largest, p[:, None] * q[None, :])
        a_power += M
        b_power += N
    exponent = largest.to(tl.int32, bitcast=True)
    scale = _power((254 << 23) - exponent) * 8192.0  # 2^13
    total = _whole(acc * scale)
    for _ in range(count):
        x = tl.load(a, mask=in_m, other=0.0)
        y = tl.load(b, mask=in_n, other=0.0)
        total += _whole(x[:, None] * y[None, :] * scale)
        a += M
        b += N
    result = total * (largest * 0.0001220703125)  # 2^-13
    return _power(result.to(tl.int32, bitcast=True) & -1024)  # 13 fraction bits


@triton.jit
def _arithmetic_mm_kernel(
    a_ptr,  # float32 [K, M]
    a_detail_ptr,
    b_ptr,  # float32 [K, N]
    b_detail_ptr,
    table_ptr,  # float32 [SIZE, SIZE]
    out_ptr,  # float32 [M, N]
    M,
    N,
    K,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    HOPPER: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    a, a_detail, b, b_detail = a_ptr + rows, a_detail_ptr + rows, b_ptr + columns, b_detail_ptr + columns
    if HOPPER:
        for step in range(tl.cdiv(K, _INSTRUCTION)):
            count = tl.minimum(K - step * _INSTRUCTION, _INSTRUCTION)
            acc = _instruction(acc, a, a_detail, b, b_detail, count, in_m, in_n, M, N)
            a += M * _INSTRUCTION
            a_detail += M * _INSTRUCTION
            b += N * _INSTRUCTION
            b_detail += N * _INSTRUCTION
    else:
        for _ in range(K):
            product = tl.load(a, mask=in_m, other=0.0)[:, None] * tl.load(b, mask=in_n, other=0.0)[None, :]
            if KIND != _EXACT:
                x = tl.load(a_detail, mask=in_m, other=0)
                y = tl.load(b_detail, mask=in_n, other=0)
                if KIND == _MITCHELL:
                    s = x[:, None] + y[None, :]
                    product *= tl.maximum(s + 1.0, s + s)
                else:
                    product *= tl.load(table_ptr + x[:, None] * SIZE + y[None, :])
                a_detail += M
                b_detail += N
            acc = _round(acc + _round(product, PRODUCTS), SUMS)
            a += M
            b += N
    out = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out, acc, mask=in_m[:, None] & in_n[None, :])


def arithmetic_mm(
    a: Tensor,
    a_detail: Tensor | None,
    b: Tensor,
    b_detail: Tensor | None,
    table: Tensor | None,
    kind: str,
    products: Grid,
    sums: Grid,
    hopper: bool = False,
) -> Tensor:
    """float32 [M, N] from `a` [K, M] and `b` [K, N], float32 and contiguous.

    a_detail, b_detail: of the same shapes; float32 for `mitchell` and `hopper`, int64 for `table`. table: float32 [n, n]. Raises
    KernelError for an unknown kind and for a grid that the kernel has not (`Grid.supported`).
    """
    if kind not in KINDS or not products.supported or not sums.supported:
        raise KernelError(
            f"arithmetic_mm has no form for {kind} with {products.format.name} and {sums.format.name}: run the tiles in torch"
        )
    (depth, m), n = a.shape, b.shape[1]
    out = a.new_empty((m, n))
    nothing = a if table is None else table
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
    if not grid[0] * grid[1]:
        return out
    with torch.cuda.device(a.device if a.is_cuda else -1):
        _arithmetic_mm_kernel[grid](
            a, a if a_detail is None else a_detail, b, b if b_detail is None else b_detail, nothing, out, m, n, depth,
            KIND=KINDS[kind], SIZE=1 if table is None else table.shape[1], HOPPER=hopper, PRODUCTS=products.constexpr, SUMS=sums.constexpr,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out
