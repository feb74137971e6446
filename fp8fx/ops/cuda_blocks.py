"""What *lower* leaves of products with scales of blocks, by cuBLASLt, which has two kinds of them on Hopper and is the faster one.

    A [M, K] in blocks 1x128, B [K, N] in 128x128 (weights) or in 128x1 (the gradient of a weight): fp8fx.kernels.scaled_mm has them too

Each partial sum of 128 terms is scaled and added in float32, as the project's kernel does it, in another order. The cost tables price
blocks as measured where this takes them: of what it refuses, a bias among them, FP8 costs 5 to 50% more than they say.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.ops.scaled_mm import ScaledMM

_SIDE = 128
_BY_ROWS, _SQUARE, _BY_COLUMNS = (1, _SIDE), (_SIDE, _SIDE), (_SIDE, 1)
_DTYPES = (torch.bfloat16, torch.float32)


def by_torch(mm: ScaledMM) -> Tensor | None:
    """The product, or None where cuBLASLt does not take it as it lies."""
    if not _fits(mm):
        return None
    assert mm.scale_a is not None
    assert mm.scale_b is not None
    refused = _REFUSED.setdefault((mm.a.device, tuple(mm.block_b)), set())
    asked = (*mm.a.shape, mm.b.shape[1], mm.dtype)
    if len(refused) == MOST or asked in refused:
        return None
    try:
        return _product(mm, mm.scale_a, mm.scale_b)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or ("CUDA error" in str(error) and "NOT_SUPPORTED" not in str(error)):
            raise  # the device is lost, or a launch before this one failed: not ours to hide
        refused.add(asked)
        if len(refused) == 1:
            what = f"a product of blocks, {tuple(mm.a.shape)} by {tuple(mm.b.shape)}"
            warnings.warn(f"fp8fx: cuBLASLt refuses {what}: {error}. The project's kernel runs such products", FP8Warning, stacklevel=2)
        return None


# (device, blocks of B) -> M, K, N and dtype of products that cuBLASLt has refused, against what `_fits` expects. It is not asked again for
# those, nor for others after so many.
_REFUSED: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
MOST = 8


def _product(mm: ScaledMM, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    kinds = torch.nn.functional.ScalingType
    square = mm.block_b[1] == _SIDE
    kind, scale_b = (kinds.BlockWise128x128, by_columns(scale_b, 4)) if square else (kinds.BlockWise1x128, by_columns(scale_b.mT))
    made: Tensor = torch.nn.functional.scaled_mm(
        *(mm.a, mm.b, by_columns(scale_a), kinds.BlockWise1x128, scale_b, kind), output_dtype=mm.dtype
    )
    return made


def by_columns(scale: Tensor, whole: int = 1) -> Tensor:
    """`scale` [R, C] with strides (1, R), as cuBLASLt reads scales of blocks: a copy where it lies otherwise.

    Of the scales of squares it wants four along K, or eight, or twelve: rows of zeros are added up to a multiple of `whole`.
    """
    if scale.shape[0] % whole:
        return torch.nn.functional.pad(scale.mT, (0, -scale.shape[0] % whole)).mT
    made = scale if scale.mT.is_contiguous() else scale.mT.contiguous().mT
    return made.as_strided(made.shape, (1, made.shape[0]))  # of a single column or row torch takes no other strides


def _fits(mm: ScaledMM) -> bool:
    return lies_right(mm) and mm.a.is_cuda and _available(mm.a.device)


def lies_right(mm: ScaledMM) -> bool:
    """Blocks, sizes, types and layout are ones that cuBLASLt takes."""
    a, b, bias = mm.a, mm.b, mm.bias
    if tuple(mm.block_a) != _BY_ROWS or tuple(mm.block_b) not in (_SQUARE, _BY_COLUMNS):
        return False
    if bias is not None or a.dim() != 2 or b.dim() != 2 or a.dtype != torch.float8_e4m3fn or b.dtype != a.dtype or mm.dtype not in _DTYPES:
        return False
    (m, k), n = a.shape, b.shape[1]
    if not m or not n or not k or m % 16 or k % _SIDE or n % (_SIDE if mm.block_b[1] == _SIDE else 16):
        return False
    aligned = a.is_meta or (a.data_ptr() | b.data_ptr()) % 16 == 0
    return a.is_contiguous() and b.mT.is_contiguous() and aligned


@functools.cache
def _available(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and known_to_torch()


def known_to_torch() -> bool:
    """This torch has the cuBLASLt of CUDA 12.9, and calls it so."""
    cuda = tuple(map(int, (torch.version.cuda or "0").split(".")))
    return cuda >= (12, 9) and hasattr(torch.nn.functional, "ScalingType")
