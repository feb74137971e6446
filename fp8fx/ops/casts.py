"""cast, cast_current, cast_amax: quantize as kernels do it. *lower* writes the first two in place of `quantize` on a CUDA device.

    cast(x, spec, scale, record, layout)        -> q, qt                     under a scale that is known, or none
    cast_current(x, spec, record, layout)       -> q, qt, scale, scale_t     current scaling
    cast_amax(x, amax, spec, record, layout)    -> q, qt, scale              the same with one scale, where the amax is known already

q has the shape of x [..., K], row-major, with scales along K. qt [M, K] (M: all rows of x) is column-major, as a GEMM over the rows wants
it, each column padded to a multiple of 16 bytes (`kernels.layout`), with scales along M; with one scale per tensor it holds the codes of q,
and scale_t has no elements. layout: rows, transposed or both; what it leaves out has no elements. The codes, scales and random bits are
those of `quantize`.

A *record* is float32 [4] in memory that outlives the call: amax, non-zero elements, how many of those became zero, nothing. The operator
raises the first and adds to the others, if they are counted. No graph ever reads a record, so to a graph the operator is functional; the
runtime reads it when a step is over (docs/decisions/0012). Counts are a sample: of some rows, the same for every call of a shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.kernels.layout import empty_transposed
from fp8fx.ops.library import define
from fp8fx.ops.quantize import as_matrix, largest, quantize_reference
from fp8fx.spec import TensorSpec, turned

LAYOUTS = ("rows", "transposed", "both")
RECORD = 4  # columns of a record: amax, non-zero elements, those that became zero, nothing (16 bytes)
GRADIENT = "grad_output"  # the role whose record has counts


def _columns(q: Tensor) -> Tensor:
    """[..., K] as [M, K], column-major, laid out as kernels do it: fakes know one layout."""
    matrix = as_matrix(q)
    return empty_transposed(matrix.shape, q.dtype, q).copy_(matrix.mT).mT


def _record(record: Tensor | None, x: Tensor, q: Tensor, amax: Tensor, format: str, role: str) -> None:
    if record is None:
        return
    record = record.data  # autograd has saved it for a backward, and is not told that it changes
    record[0] = torch.maximum(record[0], largest(amax))
    if role == GRADIENT:
        nonzero = x != 0
        record[1] += torch.count_nonzero(nonzero)
        record[2] += torch.count_nonzero(nonzero & (numerics.decode(q, format) == 0))


def cast_reference(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    """`scale`: float32 (), None where the spec has no scaling."""
    q, _, amax = quantize_reference(x, spec, [-1], rng, site, role, scale)
    _record(record, x, q, amax, TensorSpec.parse(spec).format, role)
    nothing = q.new_empty(0)
    return q if layout != "transposed" else nothing, _columns(q) if layout != "rows" else nothing


def cast_fake(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    dtype = formats.get(TensorSpec.parse(spec).format).torch_dtype or torch.uint8
    matrix = (math.prod(x.shape[:-1]), x.shape[-1])
    q = x.new_empty(x.shape if layout != "transposed" else (0,), dtype=dtype)
    return q, empty_transposed(matrix, dtype, x).mT if layout != "rows" else x.new_empty((0,), dtype=dtype)


cast = define(
    "cast(Tensor x, str spec, Tensor? rng, str site, str role, Tensor? scale, Tensor? record, str layout) -> (Tensor q, Tensor qt)",
    cast_reference,
    cast_fake,
)


def cast_current_reference(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed, matrix = TensorSpec.parse(spec), as_matrix(x)
    nothing = x.new_empty(0, dtype=torch.float32)
    q, scale, amax = quantize_reference(x, spec, [-1], rng, site, role)
    _record(record, x, q, amax, parsed.format, role)
    if parsed.granularity == "tensor":
        parts = q.new_empty(0) if layout == "transposed" else q, _columns(q) if layout != "rows" else q.new_empty(0)
        return *parts, scale, nothing
    if layout == "rows":
        return q, q.new_empty(0), scale, nothing
    qt, scale_t, _ = quantize_reference(matrix, turned(parsed).text, [0], rng, site, role)
    qt = _columns(qt)
    return (q.new_empty(0), qt, nothing, scale_t) if layout == "transposed" else (q, qt, scale, scale_t)


def cast_current_fake(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, qt = cast_fake(x, spec, rng, site, role, None, record, layout)
    scale, scale_t = scale_shapes(x, TensorSpec.parse(spec), layout)
    return q, qt, x.new_empty(scale, dtype=torch.float32), x.new_empty(scale_t, dtype=torch.float32)


def scale_shapes(x: Tensor, spec: TensorSpec, layout: str) -> tuple[list[int], list[int]]:
    """Of the scales of q and of qt."""
    granularity = spec.granularity
    if granularity == "tensor":
        return [], [0]
    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    if isinstance(granularity, str):  # row
        shapes = [*x.shape[:-1], 1], [1, k]
    else:
        (r, c), blocks = granularity, lambda size, of: (size + of - 1) // of
        shapes = [*x.shape[:-2], blocks(x.shape[-2], r), blocks(k, c)], [blocks(m, c), blocks(k, r)]
    return (shapes[0] if layout != "transposed" else [0]), (shapes[1] if layout != "rows" else [0])


cast_current = define(
    "cast_current(Tensor x, str spec, Tensor? rng, str site, str role, Tensor? record, str layout)"
    " -> (Tensor q, Tensor qt, Tensor scale, Tensor scale_t)",
    cast_current_reference,
    cast_current_fake,
)


def cast_amax_reference(
    x: Tensor, amax: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`amax`: float32 (), that of x. What computes x can find it on the way, which saves the read of x that `cast_current` begins with."""
    parsed = TensorSpec.parse(spec)
    scale = numerics.compute_scale(amax, parsed.format, parsed.power_of_two, parsed.eps)
    return *cast_reference(x, spec, rng, site, role, scale, record, layout), scale


cast_amax = define(
    "cast_amax(Tensor x, Tensor amax, str spec, Tensor? rng, str site, str role, Tensor? record, str layout)"
    " -> (Tensor q, Tensor qt, Tensor scale)",
    cast_amax_reference,
    lambda x, amax, *rest: cast_current_fake(x, *rest)[:3],
)
