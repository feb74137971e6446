"""What *lower* leaves of products with scales of blocks, by cuBLASLt, which has two kinds of them on Hopper and is the faster one.

    A [M, K] in blocks 1x128, B [K, N] in 128x128 (weights) or in 128x1 (the gradient of a weight): fp8fx.kernels.scaled_mm has them too

Each partial sum of 128 terms is scaled and added in float32, as the project's kernel does it, in another order. The cost tables price
blocks as measured where this takes them: of what it refuses, a bias among them, FP8 costs 5 to 50% more than they say.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.ops.scaled_mm import ScaledMM

_SIDE = 128
_BY_ROWS, _SQUARE, _BY_COLUMNS = (1, _SIDE), (_SIDE, _SIDE), (_SIDE, 1)
_DTYPES = (torch.bfloat16, torch.float32)


def by_torch(mm: ScaledMM) -> Tensor | None:
    """The product, or None where cuBLASLt does not take it as it lies."""
    block_b = tuple(mm.block_b)
    if tuple(mm.block_a) != _BY_ROWS or block_b not in (_SQUARE, _BY_COLUMNS) or not _fits(mm):
        return None
    assert mm.scale_a is not None
    assert mm.scale_b is not None
    if (mm.a.device, block_b) in _REFUSED:
        return None
    try:
        return _product(mm, mm.scale_a, mm.scale_b)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or ("CUDA error" in str(error) and "NOT_SUPPORTED" not in str(error)):
            raise  # the device is lost, or a launch before this one failed: not ours to hide
        _REFUSED.add((mm.a.device, block_b))
        warnings.warn(f"fp8fx: cuBLASLt refuses a product of blocks: {error}. The project's kernel runs them", FP8Warning, stacklevel=2)
        return None


# Devices and blocks of B whose products cuBLASLt has refused, against what `_fits` expects: it is not asked again.
_REFUSED: set[tuple[torch.device, tuple[int, ...]]] = set()


def _product(mm: ScaledMM, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    kinds = torch.nn.functional.ScalingType
    square = mm.block_b[1] == _SIDE
    kind, scale_b = (kinds.BlockWise128x128, scale_b) if square else (kinds.BlockWise1x128, scale_b.mT)
    made: Tensor = torch.nn.functional.scaled_mm(
        *(mm.a, mm.b, by_columns(scale_a), kinds.BlockWise1x128, by_columns(scale_b), kind), output_dtype=mm.dtype
    )
    return made


def by_columns(scale: Tensor) -> Tensor:
    """`scale` [R, C] with strides (1, R), as cuBLASLt reads scales of blocks: a copy where it lies otherwise."""
    made = scale if scale.mT.is_contiguous() else scale.mT.contiguous().mT
    return made.as_strided(made.shape, (1, made.shape[0]))  # of a single column or row torch takes no other strides


def _fits(mm: ScaledMM) -> bool:
    a, b, bias = mm.a, mm.b, mm.bias
    if bias is not None or a.dim() != 2 or b.dim() != 2 or a.dtype != torch.float8_e4m3fn or b.dtype != a.dtype or mm.dtype not in _DTYPES:
        return False
    (m, k), n = a.shape, b.shape[1]
    # Scales of squares are padded to four along K there, and ours are not.
    whole = (4 * _SIDE, _SIDE) if mm.block_b[1] == _SIDE else (_SIDE, 16)
    if not m or not n or not k or m % 16 or k % whole[0] or n % whole[1]:
        return False
    if not a.is_contiguous() or not b.mT.is_contiguous() or (a.data_ptr() | b.data_ptr()) % 16:
        return False
    return a.is_cuda and _available(a.device)


@functools.cache
def _available(device: torch.device) -> bool:
    """Hopper, with the cuBLASLt of CUDA 12.9 and a torch that calls it so."""
    cuda = tuple(map(int, (torch.version.cuda or "0").split(".")))
    functional = torch.nn.functional
    return torch.cuda.get_device_capability(device)[0] == 9 and cuda >= (12, 9) and hasattr(functional, "ScalingType")
