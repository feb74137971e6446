"""product: one matrix product under an arithmetic, by the cheapest form that means it.

    a float product      exact products, float32 sums                                   one `a @ b`
    factored             a multiplier by table, float32 sums                            r products, T = sum_r u_r v_r^T (multiplier.py)
    in tiles             all else: rounded products, rounded sums, Hopper, large tables tiles.py; on a GPU one Triton kernel

`form_of` says which. The first two add in no defined order, as every float product does. With `chunk` each partial sum takes its form, and
the outer sum is rounded in order. Memory beyond operands and result: two operands, and tiles.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.arithmetic import compiled as compiling
from fp8fx.arithmetic import operands as op
from fp8fx.arithmetic.multiplier import BUILT_IN, LARGEST_MANTISSA, Multiplier
from fp8fx.arithmetic.numbers import Round, number, rounder
from fp8fx.arithmetic.operands import Parts
from fp8fx.arithmetic.spec import HOPPER, Arithmetic, Given
from fp8fx.arithmetic.stream import OUTER, OUTPUT, Stream
from fp8fx.arithmetic.tiles import Steps, drawing
from fp8fx.errors import ModelError

FORMS = ("float", "factored", "tiles")
TERMS = 1 << 24  # elements of one factored operand at a time: 64 MiB
ROWS, COLUMNS = 32, 512  # of an eager tile: 64 KiB, so that the dozen temporaries of a step stay in a core's cache
DRAWN_ROWS = 128  # where random words are drawn: a hundred operators per step, on a quarter of the elements

Formats = tuple[str, str]


def form_of(arithmetic: Given, formats: Formats = ("", "")) -> str:
    """The form that a product of operands in these formats ("": float32, any value) takes: one of FORMS. arithmetic: as in `matmul`."""
    arithmetic = Arithmetic.of(arithmetic)
    if arithmetic.products != "float32" or arithmetic.accumulate != "float32":
        return "tiles"
    if arithmetic.multiplier == "exact":
        return "float"
    table = arithmetic.table(_width(_formats(arithmetic, formats)))
    return "tiles" if table is None or table.factors is None else "factored"


def prepare(arithmetic: Given, formats: Collection[str], device: torch.device) -> None:
    """Put on `device` what products of operands in these formats read there, so that a CUDA graph finds it: it could not copy tables."""
    arithmetic = Arithmetic.of(arithmetic)
    for left, right in itertools.product(formats, repeat=2):
        given = _formats(arithmetic, (left, right))
        form = form_of(arithmetic, given)
        if form == "float" or (table := arithmetic.table(_width(given))) is None:
            continue
        if form == "factored":
            table.factors_on(device)
        elif arithmetic.multiplier not in BUILT_IN and not table.mismatch(given):
            table.table_on(device, given[0])


def _formats(arithmetic: Arithmetic, given: Formats) -> Formats:
    return (arithmetic.operands, arithmetic.operands) if arithmetic.operands else given


def _width(given: Formats) -> int | None:
    """Mantissa bits of the wider operand; None where a format is not known, or has too many for a table."""
    bits = [formats.get(name).mantissa_bits for name in given if name]
    return max(bits) if len(bits) == 2 and max(bits) <= LARGEST_MANTISSA else None


def product(
    a: Tensor, b: Tensor, arithmetic: Arithmetic, given: Formats = ("", ""), compiled: bool = False, stream: Stream | None = None
) -> Tensor:
    """`a` [..., M, K] times `b` [..., K, N] in float32, batch dimensions broadcast: [..., M, N].

    given: formats whose values `a` and `b` are known to be (names of fp8fx.formats, or ""). compiled: tiles on a CPU through Inductor.
    stream: the random words, where rounding is stochastic; such tiles run eagerly.
    Raises ModelError for a code table whose operands have no known format of 8 bits.
    """
    given = _formats(arithmetic, given)
    a, b = op.rounded(a, arithmetic.operands), op.rounded(b, arithmetic.operands)
    stream = stream if arithmetic.stochastic else None
    matrix = functools.partial(_matrix, arithmetic=arithmetic, given=given, compiled=compiled and stream is None)
    if a.dim() == 2 and b.dim() == 2:
        return matrix(a, b, stream)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if form_of(arithmetic, given) == "float" and not (arithmetic.chunk or arithmetic.shift):
        y = a @ b
        return _rounded_output(y.reshape(-1, y.shape[-1]), arithmetic, stream).view(y.shape)
    if b.dim() == 2:
        return matrix(a.reshape(-1, a.shape[-1]), b, stream).reshape(*a.shape[:-1], b.shape[-1])
    left = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    result = a.new_empty((left.shape[0], a.shape[-2], b.shape[-1]))
    for i in range(left.shape[0]):
        result[i] = matrix(left[i], right[i], None if stream is None else stream.at(i * a.shape[-2]))
    return result.view(*batch, *result.shape[1:])


def _rounded_output(y: Tensor, arithmetic: Arithmetic, stream: Stream | None) -> Tensor:
    """The finished sums `y` [M, N], rounded."""
    return rounder(number(arithmetic.output), arithmetic.rounding, arithmetic.overflow)(y, drawing(stream, y, 0, OUTPUT))


def _matrix(a: Tensor, b: Tensor, stream: Stream | None, arithmetic: Arithmetic, given: Formats, compiled: bool) -> Tensor:
    """[M, K] by [K, N]."""
    form = form_of(arithmetic, given)
    a = a * 2.0**arithmetic.shift if form == "float" and arithmetic.shift else a
    partial = {"float": _float, "factored": _factored, "tiles": _tiles}[form](a, b, arithmetic, given, compiled, stream)
    depth = a.shape[1]
    if arithmetic.chunk == 0 or depth == 0:
        return _rounded_output(partial(0, depth), arithmetic, stream) * 2.0**-arithmetic.shift
    outer: Round = rounder(number(arithmetic.outer), arithmetic.rounding, arithmetic.overflow)
    total = a.new_zeros((a.shape[0], b.shape[1]))
    for start in range(0, depth, arithmetic.chunk):
        total = outer(total + partial(start, min(start + arithmetic.chunk, depth)), drawing(stream, total, start, OUTER))
    return _rounded_output(total, arithmetic, stream) * 2.0**-arithmetic.shift


Partial = Callable[[int, int], Tensor]  # (start, stop) of k -> [M, N]


def _float(a: Tensor, b: Tensor, arithmetic: Arithmetic, given: Formats, compiled: bool, stream: Stream | None) -> Partial:
    return lambda start, stop: a[:, start:stop] @ b[start:stop]


def _factored(a: Tensor, b: Tensor, arithmetic: Arithmetic, given: Formats, compiled: bool, stream: Stream | None) -> Partial:
    """r products as one whose contraction is r times as deep: [M, K r] by [K r, N], so many k at a time as fit in TERMS elements."""
    table = arithmetic.table(_width(given))
    assert table is not None
    factors = table.factors
    assert factors is not None
    left, right = _indexed(a, b.mT, table, given)  # [M, K] and [N, K]
    left = _shifted(left, arithmetic)
    finite = op.finite(a) and op.finite(b)
    if not finite:
        left, right = (Parts(torch.where(x.values.isfinite(), x.values, 0.0), x.detail) for x in (left, right))
    u, v = table.factors_on(a.device)  # [n, r]
    step = max(TERMS // (factors.terms * max(a.shape[0], b.shape[1], 1)), 1)

    def partial(start: int, stop: int) -> Tensor:
        result = a.new_zeros((a.shape[0], b.shape[1]))
        for first in range(start, stop, step):
            here = (slice(None), slice(first, min(first + step, stop)))
            result.addmm_(_terms(left[here], u), _terms(right[here], v).mT)
        return result if finite else _with_nonfinite(result, a[:, start:stop], b[start:stop])

    return partial


def _terms(x: Parts, factor: Tensor) -> Tensor:
    """[S, K r]: +-2^e times the r entries of `factor` [n, r] for each element's index."""
    assert x.detail is not None
    entries = factor.index_select(0, x.detail.reshape(-1)).view(*x.detail.shape, -1)
    return entries.mul_(x.values[..., None]).flatten(1)


def _with_nonfinite(result: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`result` where all of a row of A and a column of B are finite; elsewhere the inf or NaN that the exact sum of signs has."""
    rows, columns = ~a.isfinite().all(1, keepdim=True), ~b.isfinite().all(0, keepdim=True)
    signs = [torch.where(x.isfinite(), x.sign(), x) for x in (a, b)]
    return torch.where(rows | columns, signs[0] @ signs[1], result)


def _indexed(a: Tensor, b: Tensor, table: Multiplier, given: Formats) -> tuple[Parts, Parts]:
    """Both operands, in whatever layout, as powers and indices into the table."""
    if table.mantissa_bits is not None:
        a, b = (op.with_mantissa(x, table.mantissa_bits, name) for x, name in zip((a, b), given, strict=True))
    elif wrong := table.mismatch(given):
        usual = table.format or "e4m3fn"
        raise ModelError(f"multiplier {table.name}: {wrong}. Write operands: {usual}, or quantize both to the format the table is made for")
    return op.indexed(a.contiguous(), table, given[0]), op.indexed(b.contiguous(), table, given[1])


def _shifted(x: Parts, arithmetic: Arithmetic) -> Parts:
    return Parts(x.values * 2.0**arithmetic.shift, x.detail) if arithmetic.shift else x


def split(a: Tensor, b: Tensor, arithmetic: Arithmetic, given: Formats) -> tuple[Steps, Parts, Parts]:
    """What the tiles read: `a` [M, K] and `b` [K, N] split for this arithmetic, K first, and its steps."""
    a, b = a.mT.contiguous(), b.contiguous()
    if arithmetic.multiplier == "mitchell":
        return Steps.of(arithmetic, "mitchell"), op.logarithmic(a), op.logarithmic(b)
    table = arithmetic.table(None)
    if table is not None:
        left, right = _indexed(a, b, table, given)
        return Steps.of(arithmetic, "table", table.table_on(a.device, given[0])), left, right
    if arithmetic.accumulate == HOPPER:
        return Steps.of(arithmetic, "exact"), op.with_exponent(a, given[0]), op.with_exponent(b, given[1])
    return Steps.of(arithmetic, "exact"), op.exact(a), op.exact(b)


def _tiles(a: Tensor, b: Tensor, arithmetic: Arithmetic, given: Formats, compiled: bool, stream: Stream | None) -> Partial:
    steps, left, right = split(a, b, arithmetic, given)
    left = _shifted(left, arithmetic)
    kernel = _kernel(arithmetic, steps) if a.is_cuda else None
    finite = arithmetic.accumulate != HOPPER or (op.finite(a) and op.finite(b))
    rows, columns = (compiling.ROWS, compiling.COLUMNS) if compiled else (ROWS if stream is None else DRAWN_ROWS, COLUMNS)

    def partial(start: int, stop: int) -> Tensor:
        depth = slice(start, stop)
        if kernel is not None:
            result: Tensor = kernel(arithmetic, steps, left[depth, slice(None)], right[depth, slice(None)])
        else:
            result = a.new_empty((a.shape[0], b.shape[1]))
            for i in range(0, a.shape[0], rows):
                x = left[depth, slice(i, i + rows)]
                for j in range(0, b.shape[1], columns):
                    y = right[depth, slice(j, j + columns)]
                    acc = a.new_zeros((x.values.shape[1], y.values.shape[1]))
                    here = None if stream is None else stream.at(i, j)
                    tile = compiling.advance(arithmetic, steps, acc, x, y) if compiled else steps.advance(acc, x, y, here, start)
                    result[i : i + rows, j : j + columns] = tile
        return result if finite else _with_nonfinite(result, a[:, depth], b[depth])

    return partial


def _kernel(arithmetic: Arithmetic, steps: Steps) -> Callable[..., Tensor] | None:
    """The Triton kernel, where Triton is there and it has these formats; else torch's own operators run the tiles on the GPU."""
    try:
        from fp8fx.arithmetic import gpu
    except ImportError:
        return None
    return gpu.tiles_on_gpu if gpu.supported(arithmetic, steps) else None
