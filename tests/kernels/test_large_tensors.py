"""More than 2^31 elements: what lies beyond is the reference's, and what lies before it is not written over. Also in test_casts.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_checks import nearly_the_codes, needs_memory, same_bytes, same_floats
from torch import Tensor
from torch.nn import functional as F

from fp8fx import formats, numerics
from fp8fx.numerics.philox import philox_block
from fp8fx.numerics.tensor import dequantize_tensor, quantize_scaled
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels.activation_cast import activation_cast
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.cast import Rounding, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.norm_cast import norm_cast
from fp8fx.kernels.round_values import round_values

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 65_664, 32_768  # 2^31 elements and 128 rows more
ENDS = slice(0, 128), slice(ROWS - 128, ROWS)
RNG, KEY = torch.tensor([5, 6, 7]), 99
Block = tuple[int, int]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    needs_memory(24)
    yield
    torch.cuda.empty_cache()


def large() -> Tensor:
    """bfloat16 [ROWS, COLUMNS] on the GPU, random at both ends, one row all the way between; the largest, 300, is the last."""
    x = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda")
    x[:] = torch.randn(COLUMNS, device="cuda")
    for end in ENDS:
        x[end] = torch.randn(128, COLUMNS, device="cuda")
    x[-1, -1] = 300.0
    return x


def bits_of(rows: slice) -> Tensor:
    """The random bits of these rows' elements."""
    seed, step, call = RNG.tolist()
    block = torch.arange(rows.start * COLUMNS // 4, rows.stop * COLUMNS // 4)
    words = philox_block((block & 0xFFFFFFFF, block >> 32, step, call), (seed, KEY))
    return torch.stack([word for word in words if isinstance(word, Tensor)], -1).view(-1, COLUMNS)


def part(whole: Tensor | None, rows: slice) -> Tensor:
    assert whole is not None
    return whole[..., rows, :].contiguous()


@pytest.mark.parametrize("blocks", [((1, 128), (128, 1)), ((128, 128), (128, 128))], ids=str)
def test_cast_block(blocks: tuple[Block, Block]) -> None:
    x = large()
    made = cast_block(x, "e4m3fn", *blocks, "both", power_of_two=True)
    assert made.q_t is not None
    for end in ENDS:
        for codes, scale, block in zip((made.q, made.q_t.mT), (made.scale, made.scale_t), blocks, strict=True):
            spec = TensorSpec(format="e4m3fn", granularity=block, power_of_two=True)
            expected, wanted, _ = numerics.quantize_tensor(x[end].cpu(), spec)
            same_bytes(part(codes, end), expected)
            same_floats(part(scale, slice(end.start // block[0], end.stop // block[0])), wanted)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_cast_rows(rounding: str) -> None:
    x, record = large(), torch.zeros(1, device="cuda")
    how = Rounding(rounding, "saturate", RNG.cuda(), KEY)
    made = cast_current(x.view(-1, COLUMNS // 2), "e5m2", "row", how=how, record=record)  # in one read, for rows as short as these
    spec = TensorSpec(format="e5m2", granularity="row", rounding=rounding)
    for end in ENDS:
        bits = bits_of(end).view(-1, COLUMNS // 2) if rounding == "stochastic" else None
        expected, scale, _ = numerics.quantize_tensor(x[end].cpu().view(-1, COLUMNS // 2), spec, (-1,), bits)
        rows = slice(2 * end.start, 2 * end.stop)
        same_bytes(part(made.q, rows), expected)
        same_floats(part(made.scale, rows), scale)
    assert float(record) == 300.0


def test_swiglu() -> None:
    h, u, scale = large(), large(), torch.tensor(0.02, device="cuda")
    kept = Kept.empty(h), Kept.empty(u)
    q, t = activation_cast(h, u, "silu", "e4m3fn", scale, kept=kept)
    assert t is not None
    spec = TensorSpec(format="e4m3fn", granularity=(1, 128), power_of_two=True)
    for end in ENDS:
        nearly_the_codes(part(q, end), F.silu(h[end]) * u[end], "e4m3fn", scale)
        same_bytes(part(t.mT, end), part(q, end).cpu())
        for x, (codes, scales) in zip((h, u), kept, strict=True):
            expected, wanted, _ = numerics.quantize_tensor(x[end].cpu(), spec)
            same_bytes(part(codes, end), expected.view(torch.uint8))
            same_floats(part(scales, end), wanted)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_round_values(rounding: str) -> None:
    x, record = large(), torch.zeros((), device="cuda")
    out = round_values(x, "e5m2", None, Rounding(rounding, "saturate", RNG.cuda(), KEY), record, current=True)
    scale = numerics.compute_scale(torch.tensor(300.0), "e5m2")
    for end in ENDS:
        bits = bits_of(end) if rounding == "stochastic" else None
        codes = quantize_scaled(x[end].cpu(), formats.get("e5m2"), scale, "tensor", rounding, "saturate", bits)
        same_floats(part(out, end), dequantize_tensor(codes, scale, "e5m2", "tensor", x.dtype))
    assert float(record) == 300.0


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_cast(kind: str) -> None:
    x, made = large(), torch.empty(1, device="cuda")
    weight, bias = (torch.randn(COLUMNS, device="cuda").bfloat16() for _ in range(2))
    (q, t), mean, rstd = norm_cast(x, weight, bias if kind == "layer" else None, "e4m3fn", kind, 1e-5, current=True, made_scale=made)
    assert t is not None
    assert (mean is None) == (kind == "rms")
    for end in ENDS:
        shape = (COLUMNS,)
        y = F.layer_norm(x[end], shape, weight, bias, 1e-5) if kind == "layer" else F.rms_norm(x[end], shape, weight, 1e-5)
        nearly_the_codes(part(q, end), y, "e4m3fn", made[0])
        same_bytes(part(t.mT, end), part(q, end).cpu())
        wide = x[end].double()
        square = wide.var(-1, keepdim=True, unbiased=False) if kind == "layer" else wide.square().mean(-1, keepdim=True)
        torch.testing.assert_close(part(rstd, end), (square + 1e-5).rsqrt().float(), rtol=1e-5, atol=0)
