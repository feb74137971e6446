# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device functions that turn float32 tiles into FP8 codes, as bytes: what every kernel that writes FP8 ends with.

    codes = encode(y, x, ...)      y = float32(x) * inv_scale, x the tile before scaling (a NaN keeps its sign, which * loses on a GPU)
    value = decode(codes)          float32
    value = on_grid(y, x, ...)     = decode(encode(y, x, ...))

Nearest-even on a GPU is the processor's own conversion, written as PTX, whose manual says what it does beyond max; Triton's cast
promises nothing there. Triton's interpreter has no PTX and casts wrongly, so there the tile is clamped and rounded in float32
first (the magic form: adding 1.5 * 2^(e + 23 - M) pushes every bit below the step out of the significand).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.errors import KernelError
from fp8fx.formats import Format, get
from fp8fx.kernels.interpret import INTERPRET
from fp8fx.kernels.stochastic import round_stochastic

_INF_BITS = tl.constexpr(0x7F800000)

# What the kernels write. A constexpr bool E5M2 tells the two apart.
SUPPORTED = ("e4m3fn", "e5m2")


def hardware_format(format: str | Format) -> Format:
    """The Format of `format`, or KernelError if the hardware has no such numbers."""
    found = get(format)
    if found.name not in SUPPORTED:
        raise KernelError(f"kernels write {' and '.join(SUPPORTED)}, not {found.name}: run the reference operator instead")
    return found


# Four float32 y to four codes, and the sign of each x over its code: what tells the NaNs of the reference apart. PTX defines
# `satfinite`: what lies beyond max, inf too, becomes max, and NaN the code 0x7F. Inputs $1..$4 are y, $5..$8 x.
_ENCODE = """{
    .reg .b16 lo, hi;
    .reg .b32 codes, low, high;
    cvt.rn.satfinite.FORMATx2.f32 lo, $2, $1;
    cvt.rn.satfinite.FORMATx2.f32 hi, $4, $3;
    mov.b32 codes, {lo, hi};
    prmt.b32 low, $5, $6, 0x0073;
    prmt.b32 high, $7, $8, 0x7300;
    prmt.b32 low, low, high, 0x7610;
    lop3.b32 $0, low, 0x80808080, codes, 0xEA;
}"""
_ENCODE_E4M3 = tl.constexpr(_ENCODE.replace("FORMAT", "e4m3"))
_ENCODE_E5M2 = tl.constexpr(_ENCODE.replace("FORMAT", "e5m2"))


@triton.jit
def finite_magnitude(x):
    """|x| for finite float32 x, else 0."""
    magnitude = tl.abs(x)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def ordered(x):
    """uint32 that order like |x| for finite float32 x; NaN and inf come below every finite value. See `magnitude_of`.

    Two instructions an element find a maximum so, and leave NaN and inf out of it; `finite_magnitude` and a maximum take three.
    """
    return (x.to(tl.uint32, bitcast=True) << 1) + 0x1000000  # what has all bits of the exponent set begins again at 0


@triton.jit
def magnitude_of(order):
    """float32 |x| of the largest `ordered(x)`; 0 where nothing was finite."""
    return ((tl.maximum(order, 0x1000000) - 0x1000000) >> 1).to(tl.float32, bitcast=True)


@triton.jit
def largest_of(magnitudes):
    """The largest of a tile of float32 magnitudes, a scalar; NaN where there is one."""
    # As int32, which order alike: a warp finds the largest of those in one instruction, of float32 in ten.
    return tl.max(magnitudes.to(tl.int32, bitcast=True), None).to(tl.float32, bitcast=True)


@triton.jit
def encode(y, x, random_bits, E5M2: tl.constexpr, STOCHASTIC: tl.constexpr, NONFINITE: tl.constexpr):
    """uint8 codes of float32 `y`; `x` float32 gives the sign of a NaN; `random_bits` uint32 is read if STOCHASTIC."""
    MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    # Nearest-even takes |y| from here on beyond max: the tie 61440 of e5m2 rounds up, the tie 464 of e4m3fn down.
    BEYOND: tl.constexpr = 0x47700000 if E5M2 else 0x43E80001
    magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if STOCHASTIC:
        y = round_stochastic(y, random_bits, E5M2)
        beyond = y > MAX
    else:
        beyond = (magnitude >= BEYOND) & (magnitude <= _INF_BITS)
    sign = ((x.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
    if INTERPRET:
        y = tl.where(y > MAX, MAX, tl.where(y < -MAX, -MAX, y))
        if not STOCHASTIC:
            y = _round_magic(y, 2 if E5M2 else 3, -14 if E5M2 else -6)
        codes = y.to(tl.float8e5 if E5M2 else tl.float8e4nv).to(tl.uint8, bitcast=True)
        codes = tl.where(magnitude > _INF_BITS, 0x7F, codes & 0x7F) | sign
    else:
        codes = tl.inline_asm_elementwise(
            _ENCODE_E5M2 if E5M2 else _ENCODE_E4M3, "=r,r,r,r,r,r,r,r,r", [y, x], dtype=tl.uint8, is_pure=True, pack=4
        )
    if NONFINITE:
        codes = tl.where(beyond, sign | (0x7C if E5M2 else 0x7F), codes)
    return codes


@triton.jit
def decode(codes, E5M2: tl.constexpr):
    """float32 values of uint8 codes."""
    values = codes.to(tl.float8e5 if E5M2 else tl.float8e4nv, bitcast=True).to(tl.float32)
    if INTERPRET:  # which reads the codes of NaN and inf as numbers
        low = codes & 0x7F
        infinite = tl.where((codes & 0x80) == 0, float("inf"), float("-inf"))
        if E5M2:
            values = tl.where(low == 0x7C, infinite, values)
        values = tl.where(low > (0x7C if E5M2 else 0x7E), float("nan"), values)
    return values


@triton.jit
def on_grid(y, x, random_bits, E5M2: tl.constexpr, STOCHASTIC: tl.constexpr, NONFINITE: tl.constexpr):
    """float32 values of the codes of `y`, arguments as for `encode`."""
    if STOCHASTIC:  # which has the value already
        MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
        BEYOND: tl.constexpr = (float("inf") if E5M2 else float("nan")) if NONFINITE else MAX
        magnitude = round_stochastic(y, random_bits, E5M2)
        magnitude = tl.where(magnitude > MAX, BEYOND, magnitude)
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        return decode(encode(y, x, random_bits, E5M2, STOCHASTIC, NONFINITE), E5M2)


@triton.jit
def _round_magic(y, M: tl.constexpr, EMIN: tl.constexpr):
    """Nearest-even of float32 y, |y| <= max, onto the grid of M mantissa bits; float32."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & _INF_BITS, (EMIN + 127) << 23)
    magic = (exponent + (((23 - M) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    rounded = ((y + magic) - magic).to(tl.int32, bitcast=True)
    return ((rounded & 0x7FFFFFFF) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
