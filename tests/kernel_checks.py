"""What the tests of kernels compare: codes byte for byte, or to a step of the grid; the inputs that are hard to round; memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fp8fx import formats, numerics
from fp8fx.numerics.tensor import quantize_scaled


def specials(x: Tensor) -> Tensor:
    """`x` with NaN of both signs, infinities, zeros, huge and subnormal values strewn in."""
    values = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 3e4, -6e4, 1e-7, -1e-7]
    flat = x.reshape(-1)
    step = max(flat.numel() // (3 * len(values)), 1)
    for i, value in zip(range(0, flat.numel(), step), itertools.cycle(values)):
        flat[i] = value
    return x


def same_bytes(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.is_contiguous()
    wrong = actual.cpu().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} bytes differ, first at {wrong.nonzero()[0].tolist()}"


def same_transposed(actual: Tensor | None, expected: Tensor) -> None:
    """`actual` is the qT of codes `expected`."""
    assert actual is not None
    assert_padded(actual)
    same_bytes(actual.contiguous(), expected.mT)


def assert_padded(t: Tensor) -> None:
    """The rows of qT [..., K, M] are a multiple of 16 bytes apart, and the padding of the last one is there too."""
    room = torch.empty(*t.shape[:-1], math.ceil(t.shape[-1] / 16) * 16)
    assert t.stride() == room.stride()
    assert t.untyped_storage().nbytes() - t.storage_offset() >= room.numel()


def same_floats(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)


def random_bits(shape: torch.Size, rng: Tensor, key: int) -> Tensor:
    seed, step, call = rng.tolist()
    return numerics.philox_bits(tuple(shape), seed, key, step, call)


def nearly_the_codes(actual: Tensor | None, y: Tensor, format: str, scale: Tensor | None) -> None:
    """`actual` holds the codes of y, up to one code where y lies next to a boundary: under 1% of them, all one step away.

    Where terms of a derivative cancel, what is left of them may err by more steps: up to 2^-16 of the largest value.
    """
    assert actual is not None
    assert actual.is_contiguous()
    expected = quantize_scaled(y.detach(), formats.get(format), scale)
    assert actual.shape == expected.shape
    ours, theirs = (codes.cpu().view(torch.uint8).int() for codes in (actual, expected))
    steps = torch.where((ours ^ theirs) & 0x80 != 0, (ours & 0x7F) + (theirs & 0x7F), (ours - theirs).abs())
    error = (actual.cpu().float() - expected.cpu().float()).abs()
    assert bool(((steps <= 1) | (error <= 2.0**-16 * expected.float().abs().max().cpu())).all())
    assert float((steps != 0).float().mean()) < 0.01


def nearly_transposed(actual: Tensor | None, y: Tensor, format: str, scale: Tensor | None) -> None:
    """The same of qT."""
    assert actual is not None
    assert_padded(actual)
    nearly_the_codes(actual.mT.contiguous(), y, format, scale)


def sampled_counts(x: Tensor, q: Tensor, block_m: int) -> list[float]:
    """Non-zero elements of `x` [M, K] and those with zero codes in `q`, over every 16th of the tile rows, or all of fewer than 16."""
    kept = torch.arange(x.shape[0]) // block_m % (16 if math.ceil(x.shape[0] / block_m) >= 16 else 1) == 0
    x, q = x.cpu()[kept], q.cpu()[kept]
    nonzero = x != 0
    return [float(nonzero.sum()), float((nonzero & (q.view(torch.uint8) & 0x7F == 0)).sum())]


def needs_memory(gib: float) -> None:
    """Skip the test where the GPU has less than `gib` free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.1f}")


def every_16_bits(dtype: torch.dtype) -> Tensor:
    """All values of a 16-bit dtype, [256, 256]. A float16 NaN has one sign: its conversion to float32 may or may not keep it."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    return torch.where(x.isnan(), math.nan, x) if dtype == torch.float16 else x
