"""Casts of blocks whose scales are powers of two: q and qT, under blocks of their own, from one read of x. See `cast_block`."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_checks import every_16_bits, same_bytes, same_floats, same_transposed, specials
from torch import Tensor

from fp8fx import numerics
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels.cast import Rounding
from fp8fx.kernels.cast_block import cast_block

FORMATS = ("e4m3fn", "e5m2")
OVERFLOWS = ("saturate", "nonfinite")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Block = tuple[int, int]
PAIRS: list[tuple[Block, Block]] = [
    ((1, 128), (128, 1)), ((128, 1), (1, 128)), ((1, 128), (128, 128)), ((128, 128), (128, 1)), ((1, 64), (64, 1)), ((64, 1), (64, 64)),
    ((64, 64), (64, 64)), ((1, 32), (32, 1)), ((32, 1), (1, 32)), ((32, 32), (1, 32)),
]  # fmt: skip


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Of many magnitudes, with NaN and infinities strewn in; some of the first rows and columns are zeros, infinite, subnormal or huge.

    The interpreter reads bfloat16's subnormals as zeros.
    """
    x = specials(torch.randn(shape) * torch.logspace(-5, 3, shape[-1])).to(dtype)
    tiny = torch.finfo(dtype).tiny / (1 if device == "cpu" and dtype == torch.bfloat16 else 4)
    for i, value in enumerate((0.0, -math.inf, tiny, torch.finfo(dtype).max)):
        x[..., 2 * i : 2 * i + 1, :] = value
        x[..., 2 * i : 2 * i + 1] = value
    x[x.isnan()] = math.nan  # float16 NaN may or may not keep its sign in float32
    return x


def check(x: Tensor, format: str, block: Block, block_t: Block, overflow: str, there: Tensor) -> None:
    """x on the CPU for the reference, and `there` on the device."""
    made = cast_block(there, format, block, block_t, "both", Rounding(overflow=overflow), power_of_two=True)
    sides = (made.q, made.scale, made.amax, block), (made.q_t, made.scale_t, made.amax_t, block_t)
    for same, (codes, scale, largest, each) in zip((same_bytes, same_transposed), sides, strict=True):
        spec = TensorSpec(format=format, granularity=each, overflow=overflow, power_of_two=True)
        q, wanted, biggest = numerics.quantize_tensor(x, spec)
        same(codes, q)
        same_floats(scale, wanted)
        same_floats(largest, biggest)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("blocks", PAIRS, ids=str)
def test_both_layouts_in_one_read(device: str, blocks: tuple[Block, Block], format: str) -> None:
    shapes = [(35, 37), (2, max(blocks[0]) + 1, 30), (1, 1)] if device == "cpu" else [(300, 1030), (3, 257, 200), (1, 1)]
    turn = PAIRS.index(blocks)
    shapes, first = shapes[turn % 3 :] + shapes[: turn % 3], (turn + FORMATS.index(format)) % 2
    for shape, dtype, overflow in zip(shapes, DTYPES, (OVERFLOWS * 2)[first : first + 3], strict=True):
        x = values(shape, dtype, device)
        check(x, format, *blocks, overflow, x.to(device))


@pytest.mark.parametrize("strided", ["transposed", "sliced", "stepped", "expanded", "batched", "batches turned"])
def test_strided_inputs(device: str, strided: str) -> None:
    base = values((150, 90), torch.bfloat16, device).to(device)
    batches = values((3, 140, 9), torch.bfloat16, device).to(device)
    x = {
        "transposed": base.t(),
        "sliced": base[3:70, 5:41],
        "stepped": base[::2, ::3],
        "expanded": base[0].expand(33, 90),
        "batched": batches[::2, :, 1:],
        "batches turned": batches[..., :3].permute(2, 1, 0),
    }[strided]
    for format, blocks in zip(FORMATS, (PAIRS[0], PAIRS[-1]), strict=True):
        check(x.cpu(), format, *blocks, "saturate", x)


@pytest.mark.parametrize("format", FORMATS)
def test_all_bfloat16_inputs(device: str, format: str) -> None:
    x = every_16_bits(torch.bfloat16)[:, torch.randperm(256)]  # each block has some large values
    there, block = x.to(device), (1, 128)
    others: list[Block] = [(128, 1), (128, 128)]
    for overflow, other in zip(OVERFLOWS, others, strict=True) if device == "cpu" else itertools.product(OVERFLOWS, others):
        check(x, format, block, other, overflow, there)
        alone = cast_block(there, format, block, other, "transposed", Rounding(overflow=overflow), power_of_two=True)
        spec = TensorSpec(format=format, granularity=other, overflow=overflow, power_of_two=True)
        same_transposed(alone.q_t, numerics.quantize_tensor(x, spec)[0])
        assert alone.q is None
