"""Arithmetic studies: matrix products whose multiplier, products and sums are not float32's.

    y = fp8fx.arithmetic.matmul(a, b, "multiplier=mitchell/accumulate=float16")
    y = fp8fx.arithmetic.linear(x, w, bias, Arithmetic(accumulate="hopper_fast", chunk=128))

    numbers      formats of any width up to float32, and rounding to them
    multiplier   tables of products; Mitchell's; a table as a few float products
    spec         Arithmetic: one arithmetic as a value
    operands     what the tiles read of an operand
    stream       the random words of stochastic rounding, by position
    room         whether products of codes fit the formats they are kept in
    tiles        the sums step by step, and the model of Hopper's accumulator; compiled: the same through Inductor; gpu: as a Triton kernel
    product      one matrix product, by the cheapest form
    functional   matmul and linear, with gradients
    definition   slow and obviously right; what the tests compare with

In a recipe the key `arithmetic` gives a layer's products one of these (docs/arithmetic.md).
"""

from fp8fx.arithmetic.functional import linear, matmul
from fp8fx.arithmetic.multiplier import Multiplier, mitchell_table, register
from fp8fx.arithmetic.numbers import number
from fp8fx.arithmetic.product import form_of
from fp8fx.arithmetic.spec import Arithmetic

__all__ = ["Arithmetic", "Multiplier", "form_of", "linear", "matmul", "mitchell_table", "number", "register"]
