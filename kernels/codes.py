# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device functions that turn float32 tiles into FP8 codes, as bytes: what every kernel that writes FP8 ends with.

    codes = encode(y, x, ...)      y = float32(x) * inv_scale, x the tile before scaling (a NaN keeps its sign, which * loses on a GPU)
    bits  = random_tile(...)       32 random bits per element: Philox4x32-10 by the element's logical row-major index
    value = decode(codes)          float32

Nearest-even on a GPU is the processor's own conversion, written as PTX, whose manual says what it does beyond max; Triton's cast
promises nothing there. Triton's interpreter has no PTX and casts wrongly, so there the tile is clamped and rounded in float32
first (the magic form: adding 1.5 * 2^(e + 23 - M) pushes every bit below the step out of the significand).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.errors import KernelError
from fp8fx.formats import Format, get

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

_INF_BITS = tl.constexpr(0x7F800000)
_PHILOX_A = tl.constexpr(0xD2511F53)
_PHILOX_B = tl.constexpr(0xCD9E8D57)
_WEYL_A = tl.constexpr(0x9E3779B9)
_WEYL_B = tl.constexpr(0xBB67AE85)

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
def encode(y, x, random_bits, E5M2: tl.constexpr, STOCHASTIC: tl.constexpr, NONFINITE: tl.constexpr):
    """uint8 codes of float32 `y`; `x` float32 gives the sign of a NaN; `random_bits` uint32 is read if STOCHASTIC."""
    MAX: tl.constexpr = 57344.0 if E5M2 else 448.0
    # Nearest-even takes |y| from here on beyond max: the tie 61440 of e5m2 rounds up, the tie 464 of e4m3fn down.
    BEYOND: tl.constexpr = 0x47700000 if E5M2 else 0x43E80001
    M: tl.constexpr = 2 if E5M2 else 3
    EMIN: tl.constexpr = -14 if E5M2 else -6
    magnitude = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    beyond = (magnitude >= BEYOND) & (magnitude <= _INF_BITS)
    if STOCHASTIC:
        y = _round_stochastic(y, random_bits, M, EMIN, 4.0 * MAX)
        beyond = tl.abs(y) > MAX
    sign = ((x.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
    if INTERPRET:
        y = tl.where(y > MAX, MAX, tl.where(y < -MAX, -MAX, y))
        if not STOCHASTIC:
            y = _round_magic(y, M, EMIN)
        codes = y.to(tl.float8e5 if E5M2 else tl.float8e4nv).to(tl.uint8, bitcast=True)
        codes = tl.where(magnitude > _INF_BITS, sign | 0x7F, codes)
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
def _round_magic(y, M: tl.constexpr, EMIN: tl.constexpr):
    """Nearest-even of float32 y, |y| <= max, onto the grid of M mantissa bits; float32."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & _INF_BITS, (EMIN + 127) << 23)
    magic = (exponent + (((23 - M) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    rounded = ((y + magic) - magic).to(tl.int32, bitcast=True)
    return ((rounded & 0x7FFFFFFF) | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _round_stochastic(y, random_bits, M: tl.constexpr, EMIN: tl.constexpr, CAP: tl.constexpr):
    """|y| = (k + r) steps becomes k + 1 steps where floor(r 2^32) + random_bits carries out of 32 bits; float32, unbounded above max."""
    bits = y.to(tl.int32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    a = tl.where(a > CAP, CAP, a)  # so that the factor below stays normal
    e = a.to(tl.int32, bitcast=True) >> 23
    e = tl.minimum(tl.maximum(e, EMIN + 127), 254)  # NaN has 255
    t = a * ((254 + M - e) << 23).to(tl.float32, bitcast=True)  # exact: a power of two
    k = tl.floor(t)
    fraction = ((t - k) * 4294967296.0).to(tl.uint32)
    k = tl.where(fraction > (random_bits ^ 0xFFFFFFFF), k + 1.0, k)
    rounded = (k * ((e - M) << 23).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return ((rounded & 0x7FFFFFFF) | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words: the random words of one block of four elements."""
    for _ in tl.static_range(10):
        high_a, high_b = tl.umulhi(c0, _PHILOX_A), tl.umulhi(c2, _PHILOX_B)
        low_a, low_b = c0 * _PHILOX_A, c2 * _PHILOX_B
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + _WEYL_A, k1 + _WEYL_B
    return c0, c1, c2, c3


@triton.jit
def _words(random, block):
    """The four random words of the blocks of elements with these int64 numbers; random as in `random_tile`."""
    rng_ptr, key = random
    seed, step, call = tl.load(rng_ptr), tl.load(rng_ptr + 1), tl.load(rng_ptr + 2)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (((seed >> 32) ^ key) & 0xFFFFFFFF).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = (step & 0xFFFFFFFF).to(tl.uint32), (call & 0xFFFFFFFF).to(tl.uint32)
    return philox(low, high, tl.zeros_like(low) + c2, tl.zeros_like(low) + c3, k0, k1)


@triton.jit
def random_at(random, index):
    """uint32, like index: the bits of the elements with these int64 row-major indices. Four times the work of a grouped tile."""
    w0, w1, w2, w3 = _words(random, index >> 2)
    word = (index & 3).to(tl.int32)
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def random_tile(random, rows, column, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUPED: tl.constexpr):
    """uint32 [BLOCK_M, BLOCK_K]: the bits of elements (rows [BLOCK_M] int64, column + 0..BLOCK_K) of a matrix of `width` columns.

    random: (pointer to int64 [seed, step, call], key: int32, the hash of producer and role). GROUPED: width and column are
    multiples of 4, so the four words of a block are four neighbours of one row; otherwise each element makes its own block.
    """
    start = rows * width + column
    if GROUPED:
        w0, w1, w2, w3 = _words(random, (start[:, None] >> 2) + tl.arange(0, BLOCK_K // 4)[None, :])
        return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_K)
    else:
        return random_at(random, start[:, None] + tl.arange(0, BLOCK_K)[None, :])
