# mypy: allow-untyped-defs, allow-incomplete-defs
"""The random bits of stochastic rounding, 32 per element: Philox4x32-10 by the element's logical row-major index.

One block serves four neighbours; key and counter are those of `fp8fx.numerics.philox_bits`, equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8fx.kernels.interpret import INTERPRET

_PHILOX_A = tl.constexpr(0xD2511F53)
_PHILOX_B = tl.constexpr(0xCD9E8D57)
_WEYL_A = tl.constexpr(0x9E3779B9)
_WEYL_B = tl.constexpr(0xBB67AE85)
_MULTIPLY_A, _MULTIPLY_B = (
    tl.constexpr(f"{{ .reg .b64 p; mul.wide.u32 p, $2, {factor.value}; mov.b64 {{$0, $1}}, p; }}") for factor in (_PHILOX_A, _PHILOX_B)
)


@triton.jit
def _multiply(a, b: tl.constexpr):
    """(low, high) 32 bits of the product of uint32 a and b."""
    if INTERPRET:
        product = a.to(tl.uint64) * b
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)
    else:  # one instruction; a compiler may make two of it
        return tl.inline_asm_elementwise(
            _MULTIPLY_A if b == _PHILOX_A else _MULTIPLY_B,
            "=r,=r,r",
            [a],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words, tensors or scalars: the random words of one block of four elements."""
    for _ in tl.static_range(10):
        low_a, high_a = _multiply(c0, _PHILOX_A)
        low_b, high_b = _multiply(c2, _PHILOX_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + _WEYL_A, k1 + _WEYL_B
    return c0, c1, c2, c3


@triton.jit
def words(random, block):
    """The four random words of the blocks of elements with these int64 numbers; random as in `random_tile`."""
    rng_ptr, key = random
    seed, step, call = tl.load(rng_ptr), tl.load(rng_ptr + 1), tl.load(rng_ptr + 2)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (((seed >> 32) ^ key) & 0xFFFFFFFF).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = (step & 0xFFFFFFFF).to(tl.uint32), (call & 0xFFFFFFFF).to(tl.uint32)
    return philox(low, high, c2, c3, k0, k1)


@triton.jit
def random_at(random, index):
    """uint32, like index: the bits of the elements with these int64 row-major indices. Four times the work of a grouped tile."""
    w0, w1, w2, w3 = words(random, index >> 2)
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
        w0, w1, w2, w3 = words(random, (start[:, None] >> 2) + tl.arange(0, BLOCK_K // 4)[None, :])
        return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_K)
    else:
        return random_at(random, start[:, None] + tl.arange(0, BLOCK_K)[None, :])
