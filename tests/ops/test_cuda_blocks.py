"""Products with scales of blocks that go to cuBLASLt: which do, and what comes back, within the bound of the project's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from product_checks import E4, E5, check, random_codes
from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.ops import cuda_blocks
from fp8fx.ops.cuda_blocks import by_columns, by_torch
from fp8fx.ops.scaled_mm import ScaledMM

SQUARE, COLUMNS = (128, 128), (128, 1)


def product(m: int, n: int, k: int, block_b: tuple[int, int], device: str, **changes: Any) -> ScaledMM:
    a, b = random_codes((m, k), E4, device), random_codes((n, k), E4, device).t()
    scale_a = torch.rand(m, -(-k // 128), device=device) + 0.5
    scale_b = torch.rand(-(-k // 128), -(-n // block_b[1]), device=device) + 0.5
    made = ScaledMM(a, scale_a, "e4m3fn", [1, 128], b, scale_b, "e4m3fn", list(block_b), None, torch.bfloat16)
    return made._replace(**changes)


@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (4, 1), (0, 3)], ids=str)
def test_scales_by_columns(shape: tuple[int, int]) -> None:
    for scale in (torch.randn(shape), torch.randn(shape[::-1]).mT):
        made = by_columns(scale)
        assert torch.equal(made, scale)
        assert made.mT.is_contiguous()
        assert made.stride() == (1, shape[0])
        assert by_columns(made).data_ptr() == made.data_ptr(), "what lies right is not copied"


def test_scales_of_squares_are_padded_along_k() -> None:
    scale = torch.randn(5, 3)
    made = by_columns(scale, 4)
    assert made.shape == (8, 3)
    assert made.stride() == (1, 8)
    assert torch.equal(made[:5], scale)
    assert not made[5:].any()
    assert by_columns(scale[:4], 4).shape == (4, 3)


def test_not_on_the_cpu() -> None:
    assert by_torch(product(128, 128, 512, SQUARE, "cpu")) is None


@pytest.mark.parametrize(
    ("error", "passes_on"),
    [
        (ValueError("scale_a strides must be (1, 256)"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
    ],
    ids=str,
)
def test_a_refusal_is_met_once(error: Exception, passes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own kernel runs then; what is no refusal is not hidden."""
    calls = []

    def refuse(*args: Any) -> Tensor:
        calls.append(args)
        raise error

    monkeypatch.setattr(cuda_blocks, "_fits", lambda mm: True)
    monkeypatch.setattr(cuda_blocks, "_product", refuse)
    monkeypatch.setattr(cuda_blocks, "_REFUSED", {})
    mm = product(128, 128, 512, SQUARE, "cpu")
    if passes_on:
        with pytest.raises(type(error)):
            by_torch(mm)
        return
    with pytest.warns(FP8Warning, match="cuBLASLt refuses"):
        assert by_torch(mm) is None
    assert by_torch(mm) is None
    assert len(calls) == 1
    assert by_torch(product(256, 128, 512, SQUARE, "cpu")) is None
    assert len(calls) == 2, "another size is asked for, and said nothing of"
    for m in range(3, 20):
        assert by_torch(product(128 * m, 128, 512, SQUARE, "cpu")) is None
    assert len(calls) == cuda_blocks.MOST, "sizes that always change are not asked for without end"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_b", [SQUARE, COLUMNS], ids=str)
@pytest.mark.parametrize(
    "size", [(16, 128, 512), (1024, 768, 1024), (272, 384, 2048), (256, 256, 640), (128, 128, 128), (128, 144, 128)], ids=str
)
def test_within_the_bound(size: tuple[int, int, int], block_b: tuple[int, int], dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuBLASLt has these products on Hopper only")
    if block_b == SQUARE and size[1] % 128:
        pytest.skip("squares are whole")
    mm = product(*size, block_b, "cuda", dtype=dtype)
    for scale_a in (mm.scale_a, by_columns(mm.scale_a)):  # type: ignore[arg-type]
        y = by_torch(mm._replace(scale_a=scale_a))
        assert y is not None
        check(y, mm.a, mm.b, mm.scale_a, mm.scale_b, block_a=(1, 128), block_b=block_b)  # type: ignore[arg-type]


def odd(x: Tensor) -> Tensor:
    """x one byte beside a multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return room.copy_(x)


@pytest.mark.gpu
def test_what_cublaslt_does_not_take() -> None:
    from fp8fx.ops.cuda import scaled

    mm = product(256, 256, 512, SQUARE, "cuda")
    others = [
        product(250, 256, 512, SQUARE, "cuda"),
        product(256, 200, 512, SQUARE, "cuda"),
        product(256, 256, 576, SQUARE, "cuda"),  # four squares and a half along K
        product(256, 250, 512, COLUMNS, "cuda"),
        mm._replace(dtype=torch.float16),
        mm._replace(bias=torch.randn(256, device="cuda", dtype=torch.bfloat16)),
        mm._replace(a=odd(mm.a)),
        mm._replace(a=mm.a.to(E5), format_a="e5m2"),
        mm._replace(a=mm.a.t().contiguous().t()),
    ]
    for other in others:
        assert by_torch(other) is None
        blocks = {"block_a": (1, 128), "block_b": (other.block_b[0], other.block_b[1])}
        check(scaled(*other), other.a, other.b, other.scale_a, other.scale_b, other.bias, **blocks)  # type: ignore[arg-type]
