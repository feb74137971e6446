# mypy: allow-untyped-defs, allow-incomplete-defs
"""Stochastic rounding of float32 tiles onto an FP8 grid, by 32 random bits per element (`random_bits`).

    |y| = (k + r) steps, 0 <= r < 1, becomes k + 1 steps where floor(r 2^32) + random_bits carries out of 32 bits, else k steps

In the normal range a step is one unit of the last mantissa bit that FP8 keeps, so that r is what the float32 bits have below it, and the
rounding is one addition of integers and one mask. Below that range steps no longer shrink: there, few elements as a rule, r is found in
float32. On a GPU both are written as PTX, which can jump over the second where none of four elements needs it.

Reference: `fp8fx.numerics`, equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.interpret import INTERPRET

# For element #: y is an input, `bits` too, and `rounded` an output. The normal range first; `a` is |y|.
_NORMAL = """
    abs.f32 a#, y#;
    max.NaN.f32 a#, a#, 0f00000000;                     // of all NaNs, 0x7FFFFFFF
    shr.u32 t, bits#, UNUSED;
    add.u32 t, t, a#;
    min.u32 t, t, 0x7FFFFFFF;                           // the NaN stays one
    and.b32 rounded#, t, KEPT;
"""
_BELOW = """
    mul.f32 t, a#, STEPS;                               // exact, as all that follows
    cvt.rmi.f32.f32 k, t;
    sub.f32 t, t, k;
    mul.f32 t, t, 0f4F800000;                           // 2^32
    cvt.rzi.u32.f32 t, t;
    not.b32 n, bits#;
    setp.gt.u32 up, t, n;
    @up add.f32 k, k, 0f3F800000;
    mul.f32 k, k, STEP;
    setp.lt.u32 below, a#, LOWEST;
    @below mov.b32 rounded#, k;
"""
_FOUR = """{
    .reg .pred none, up, below;
    .reg .b32 a0, a1, a2, a3, t, k, n;
    NORMAL
    min.u32 t, a0, a1;
    min.u32 k, a2, a3;
    min.u32 t, t, k;
    setp.ge.u32 none, t, LOWEST;
    @none bra DONE;
    BELOW
DONE:
}"""


def _ptx(dropped: int, emin: int) -> str:
    """PTX that rounds y $4..$7 by the bits $8..$11 to $0..$3. `dropped`: mantissa bits of float32 that FP8 has not; emin: FP8's lowest
    normal exponent."""

    def power(exponent: int) -> int:
        return (exponent + 127) << 23

    step = emin - (23 - dropped)  # the exponent of a step below the normal range
    text = _FOUR
    for name, one in (("NORMAL", _NORMAL), ("BELOW", _BELOW)):
        each = [one.replace("rounded#", f"${i}").replace("y#", f"${4 + i}").replace("bits#", f"${8 + i}") for i in range(4)]
        text = text.replace(name, "".join(part.replace("#", str(i)) for i, part in enumerate(each)))
    values = {"UNUSED": 32 - dropped, "KEPT": 0x7FFFFFFF >> dropped << dropped, "LOWEST": power(emin)}
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text.replace("STEPS", f"0f{power(-step):08X}").replace("STEP", f"0f{power(step):08X}")


_PTX_E5M2 = tl.constexpr(_ptx(21, -14))
_PTX_E4M3 = tl.constexpr(_ptx(20, -6))


@triton.jit
def round_stochastic(y, random_bits, E5M2: tl.constexpr):
    """|y| of float32 `y` on the grid, by `random_bits` uint32: float32, as large as it comes; inf and NaN stay."""
    if INTERPRET:
        return _round(tl.abs(y), random_bits, 2 if E5M2 else 3, -14 if E5M2 else -6)
    else:
        found = tl.inline_asm_elementwise(
            _PTX_E5M2 if E5M2 else _PTX_E4M3,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [y.to(tl.int32, bitcast=True), random_bits],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        return found.to(tl.float32, bitcast=True)


@triton.jit
def _round(a, random_bits, M: tl.constexpr, EMIN: tl.constexpr):
    """The formula as it stands, for a grid of M mantissa bits; float32 a >= 0."""
    bounded = tl.where(a < 1048576.0, a, 1.0)  # so that the factor below stays normal; those beyond lie outside of every grid
    e = tl.maximum(bounded.to(tl.int32, bitcast=True) >> 23, EMIN + 127)
    t = bounded * ((254 + M - e) << 23).to(tl.float32, bitcast=True)  # exact: a power of two
    k = tl.floor(t)
    fraction = ((t - k) * 4294967296.0).to(tl.uint32)
    k = tl.where(fraction > (random_bits ^ 0xFFFFFFFF), k + 1.0, k)
    return tl.where(a < 1048576.0, k * ((e - M) << 23).to(tl.float32, bitcast=True), a)
