"""Scales. One equation holds everywhere: `x ~ q * scale`. `scale` is the DEQUANTIZATION multiplier, float32.

    inv_scale = 1 / scale            one IEEE division in float32
    q         = round(float32(x) * inv_scale)

TransformerEngine and IPEX call our `inv_scale` their `scale`. Every quotient goes through `divide`, so that devices agree: CUDA
multiplies by the reciprocal of a Python number, and Inductor's Triton code divides float32 to within 2 ulp only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.errors import ModelError
from fp8fx.formats import Format
from fp8fx.numerics import statistics
from fp8fx.numerics.eager import plain_cpu
from fp8fx.spec import Granularity

# Scales stay in [2^-126, 2^126], so that a scale and its reciprocal are both normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126


def amax(x: Tensor, granularity: Granularity = "tensor", dims: tuple[int, ...] = (-1,)) -> Tensor:
    """max |x| over the finite elements, float32; 0 where there is none (all NaN or inf, or empty).

    granularity `tensor`: shape (). `row`: reduced over `dims` (the contraction), which stay with size 1.
    (r, c): per block of the last two dimensions, shape [..., ceil(M / r), ceil(K / c)]; edge blocks may be smaller.
    An element counts as finite by its float32 value. Raises ModelError for blocks of a tensor with under two dimensions.
    """
    if granularity == "tensor":
        return _amax_tensor(x)
    if granularity == "row":
        reduced = {dim % max(x.dim(), 1) for dim in dims}
        if any(x.shape[dim] == 0 for dim in reduced if x.dim()):
            shape = [1 if dim in reduced else size for dim, size in enumerate(x.shape)]
            return torch.zeros(shape, dtype=torch.float32, device=x.device)
        return _reduce(x, tuple(sorted(reduced)), keepdim=True)
    rows, columns = _block(x, granularity)
    pad_rows, pad_columns = -x.shape[-2] % rows, -x.shape[-1] % columns
    padded = torch.nn.functional.pad(x, (0, pad_columns, 0, pad_rows)) if pad_rows or pad_columns else x  # 0 never raises a maximum of |x|
    high, wide = padded.shape[-2] // rows, padded.shape[-1] // columns
    return _reduce(padded.reshape(*x.shape[:-2], high, rows, wide, columns), (-3, -1), keepdim=False)


def _amax_tensor(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return _reduce(x, tuple(range(x.dim())), keepdim=False)


def _reduce(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """max |x| over `dims`, none of them empty, of the finite elements."""
    if plain_cpu(x) and x.dtype.itemsize > 1:
        largest = x.detach().abs().amax(dims, keepdim=keepdim).float()
        if bool(largest.isfinite().all()):  # else a NaN or an inf is among the elements, and they are looked at one by one
            return largest
    return _finite_magnitude(x).amax(dims, keepdim=keepdim)


def _finite_magnitude(x: Tensor) -> Tensor:
    magnitude = x.detach().float().abs()
    return torch.where(magnitude < math.inf, magnitude, 0.0)  # NaN < inf is False


def _block(x: Tensor, granularity: Granularity) -> tuple[int, int]:
    if isinstance(granularity, str):
        raise ModelError(f"unknown granularity {granularity!r}; allowed: 'tensor', 'row' or (rows, columns)")
    if x.dim() < 2:
        raise ModelError(f"granularity {granularity} needs at least two dimensions, got shape {tuple(x.shape)}; use 'tensor' or 'row'")
    return granularity


def mean_magnitude(x: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """Mean of |x| over `dims` (kept, size 1), finite elements only, float32: what `statistic: mean` makes scales from."""
    kept = {dim % x.dim() for dim in dims}
    return statistics.mean(statistics.grouped(x, "row", dims)).reshape([1 if dim in kept else size for dim, size in enumerate(x.shape)])


def compute_scale(amax: Tensor, format: str | torch.dtype | Format, power_of_two: bool = False, eps: float = 1e-12) -> Tensor:
    """Current scaling: `max(amax, eps) / fmax`, float32, amax's shape. A non-finite amax counts as 0.

    power_of_two: 1 / 2^floor(log2(fmax / max(amax, eps))), by exponent bits (torchao's rule), so that devices agree.
    """
    fmax = formats.get(format).max
    amax = torch.where(amax < math.inf, amax, 0.0).float().clamp(min=eps)
    if power_of_two:
        return _reciprocal(_floor_power_of_two(divide(torch.full_like(amax, fmax), amax)))
    return divide(amax, torch.full_like(amax, fmax)).clamp(_SMALLEST, _LARGEST)


def compute_e8m0_scale(amax: Tensor, format: str | torch.dtype | Format, eps: float = 1e-12) -> Tensor:
    """The rule of OCP MX: 2^(floor(log2 max(amax, eps)) - floor(log2 fmax)), float32, amax's shape. A non-finite amax counts as 0.

    What lies between fmax and the next power of two saturates. Exponents stay in [-126, 126], within those of E8M0.
    """
    exponent = math.frexp(formats.get(format).max)[1] - 1
    amax = torch.where(amax < math.inf, amax, 0.0).float().clamp(min=eps)
    return (((amax.view(torch.int32) >> 23) - exponent).clamp(1, 253) << 23).view(torch.float32)


def te_current_scale(amax: Tensor, format: str | torch.dtype | Format, power_of_two: bool = False, eps: float = 0.0) -> Tensor:
    """TransformerEngine's current rule, as our dequantization multiplier: amax 0 or inf gives 1, an infinite quotient fp32 max."""
    fmax = formats.get(format).max
    floor = amax.float().clamp(min=eps)
    inv_scale = divide(torch.full_like(floor, fmax), floor)
    inv_scale = torch.where(inv_scale == math.inf, torch.finfo(torch.float32).max, inv_scale)
    inv_scale = torch.where((floor == 0.0) | ~floor.isfinite(), 1.0, inv_scale)
    return _reciprocal((inv_scale.view(torch.int32) & 0x7F800000).view(torch.float32) if power_of_two else inv_scale)


def inverse(scale: Tensor) -> Tensor:
    """`inv_scale`: 1 / scale, one IEEE division in float32."""
    return _reciprocal(scale.float())


def divide(a: Tensor, b: Tensor) -> Tensor:
    """The IEEE quotient of float32 tensors. Through float64, where rounding twice is harmless: 53 >= 2 * 24 + 2 bits."""
    return (a.double() / b.double()).float()


def _reciprocal(x: Tensor) -> Tensor:
    return divide(torch.ones_like(x), x)


def _floor_power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 x) for positive float32 x, kept in the range of scales."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(_SMALLEST, _LARGEST)


def expand_scale(scale: Tensor, granularity: Granularity, shape: tuple[int, ...]) -> Tensor:
    """`scale` so that it broadcasts against a tensor of `shape`: blocks are repeated and cut, others broadcast already."""
    if isinstance(granularity, str):
        return scale
    (rows, columns), (high, wide) = granularity, scale.shape[-2:]
    spread = scale[..., :, None, :, None].expand(*scale.shape[:-2], high, rows, wide, columns)
    return spread.reshape(*scale.shape[:-2], high * rows, wide * columns)[..., : shape[-2], : shape[-1]]
