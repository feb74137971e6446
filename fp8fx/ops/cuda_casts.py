"""The casts' implementations on CUDA devices, and what the other ones need of them. See `fp8fx.ops.cuda`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.kernels import cast as kernel
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.round_values import round_values as round_kernel
from fp8fx.ops import casts
from fp8fx.ops import quantize as quantize_op
from fp8fx.ops.inductor import FORMATS
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import TensorSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NONFINITE = kernel.Rounding(overflow="nonfinite")


@functools.lru_cache(maxsize=4096)
def _key(site: str, role: str) -> int:
    return numerics.producer_key(site, role)


def rounding_of(spec: TensorSpec, rng: Tensor | None, site: str, role: str) -> kernel.Rounding:
    if not spec.stochastic:
        return kernel.NEAREST if spec.overflow == "saturate" else NONFINITE
    return kernel.Rounding(spec.rounding, spec.overflow, rng, _key(site, role))


def has_kernel(x: Tensor, spec: TensorSpec, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    return spec.format in FORMATS and spec.rounding in ("nearest_even", "stochastic") and spec.on_hardware and x.dtype in dtypes


def cast(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed):
        return casts.cast_reference(x, spec, rng, site, role, scale, record, layout)
    matrix = x if x.dim() == 2 else as_matrix(x)
    how, counts = rounding_of(parsed, rng, site, role), record is not None and role == casts.GRADIENT
    return laid_out(x, *kernel.cast(matrix, parsed.format, scale, "tensor", layout, how, None, record, counts))


def laid_out(x: Tensor, q: Tensor | None, q_t: Tensor | None) -> tuple[Tensor, Tensor]:
    """q in the shape of x and q_t as its transpose; without elements where it was not made."""
    if q is None:
        assert q_t is not None
        return q_t.new_empty(0), q_t.mT
    return q if q.dim() == x.dim() else q.view(x.shape), q.new_empty(0) if q_t is None else q_t.mT


def cast_current(
    x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed):
        return casts.cast_current_reference(x, spec, rng, site, role, record, layout)
    matrix = x if x.dim() == 2 else as_matrix(x)
    how, block = rounding_of(parsed, rng, site, role), parsed.granularity
    if isinstance(block, str):
        side, other = ("row", "column") if block == "row" else ("tensor", None)
        counts = record is not None and role == casts.GRADIENT
        made = kernel.cast_current(matrix, parsed.format, side, other, layout, how, parsed.power_of_two, parsed.eps, record, counts)
    else:
        made = cast_block(matrix, parsed.format, block, None, layout, how, parsed.power_of_two, parsed.eps)
    nothing = x.new_empty(0, dtype=torch.float32)
    scale = made.scale if made.scale is not None else nothing
    scale_t = made.scale_t if made.scale_t is not None else nothing
    if block == "tensor":
        scale, scale_t = (scale if made.scale is not None else scale_t), nothing
    elif made.scale is not None:
        scale = scale.view(casts.scale_shapes(x, parsed, "rows")[0])
    return *laid_out(x, made.q, made.q_t), scale, scale_t


def cast_amax(
    x: Tensor, amax: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed) or not x.numel():
        return casts.cast_amax_reference(x, amax, spec, rng, site, role, record, layout)
    matrix, made = x if x.dim() == 2 else as_matrix(x), x.new_empty(1, dtype=torch.float32)
    how, counts = rounding_of(parsed, rng, site, role), record is not None and role == casts.GRADIENT
    made_of = (True, made, parsed.power_of_two, parsed.eps)
    q, q_t = kernel.cast(matrix, parsed.format, amax, "tensor", layout, how, None, record, counts, None, *made_of)
    return *laid_out(x, q, q_t), made.view(())


def quantize(
    x: Tensor, spec: str, dims: list[int], rng: Tensor | None = None, site: str = "", role: str = "", scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed) or parsed.granularity != "tensor":
        return quantize_op.quantize_reference(x, spec, dims, rng, site, role, scale)
    how = rounding_of(parsed, rng, site, role)
    if scale is None and parsed.scaling == "current":
        made = kernel.cast_current(x, parsed.format, how=how, power_of_two=parsed.power_of_two, eps=parsed.eps)
        assert made.q is not None
        assert made.scale is not None
        assert made.amax is not None
        return made.q, made.scale, made.amax
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    used = torch.ones((), dtype=torch.float32, device=x.device) if scale is None else scale.clone()
    q, _ = kernel.cast(x, parsed.format, None if scale is None else used, how=how, amax=amax)
    assert q is not None
    return q, used, amax


def round_values(x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed) or parsed.granularity != "tensor":
        return quantize_op.round_reference(x, spec, rng, site, role, scale)
    amax, current = torch.zeros((), dtype=torch.float32, device=x.device), scale is None and parsed.scaling == "current"
    how = rounding_of(parsed, rng, site, role)
    return round_kernel(x, parsed.format, scale, how, amax, current, parsed.power_of_two, parsed.eps), amax
