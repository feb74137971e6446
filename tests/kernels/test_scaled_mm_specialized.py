"""Products whose warps have different work (Gluon) against those whose warps all do the same: the same sums in the same order of K.

Of small integers every sum is exact in any order, so there the bits are equal. Gluon has no interpreter: what runs without a GPU is which
configuration is chosen, and what happens where it does not compile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import needs_memory
from product_checks import E4, E5, Block, check, operands
from torch import Tensor

pytest.importorskip("triton")
from fp8fx.errors import KernelError
from fp8fx.kernels import scaled_mm_launch
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.kernels.rounding import Rounding
from fp8fx.kernels.scaled_mm import scaled_mm
from fp8fx.kernels.scaled_mm_configs import CONFIGS, choose

needs_gluon = pytest.mark.skipif(scaled_mm_launch.SPECIALIZED is None, reason="no Gluon: Triton's interpreter, or another version of it")
SPECIALIZED, BLOCKED = CONFIGS["specialized"], CONFIGS["specialized_blocked"]
ENDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"dtype": torch.float32},
    "values": {"round_to": "e5m2", "how": "stochastic"},
    "fp32 values": {"round_to": "e4m3fn", "how": "stochastic", "dtype": torch.float32},
    "codes": {"out_format": "e4m3fn", "out_scale": 16.0, "activation": "relu", "bias": True, "record": True},
    "stochastic codes": {"out_format": "e5m2", "out_scale": 0.5, "how": "stochastic", "record": True},
}


def integers(*shape: int, dtype: torch.dtype = E5) -> Tensor:
    return torch.randint(-2, 3, shape, device="cuda").float().to(dtype)


def ended(end: dict[str, Any], n: int) -> dict[str, Any]:
    """The arguments that `end` stands for, on the GPU, with a record of their own."""
    made = dict(end)
    if "how" in end:
        made["how"] = Rounding("stochastic", "nonfinite", torch.tensor([3, 1, 4], device="cuda"), 7)
    if "out_scale" in end:
        made["out_scale"] = torch.tensor(end["out_scale"], device="cuda")
    if "bias" in end:
        made["bias"] = torch.arange(n, device="cuda", dtype=torch.float32)
    if "record" in end:
        made["record"] = torch.zeros(1, device="cuda")
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("end", ENDS)
def test_bits_of_the_plain_kernels(end: str) -> None:
    one = torch.ones((), device="cuda")
    for m, n, k in ((256, 512, 384), (1000, 1008, 272), (65, 48, 33), (3000, 4096, 1000)):
        a, b = integers(m, k), integers(n, k).t()
        rows, columns = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(1, n, device="cuda") + 0.5
        for scales in ((one, one), (rows, columns), (one, columns)):
            same_bits(a, b, scales, end, "specialized", "precise", accumulate="precise")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 1])
@pytest.mark.parametrize("end", ENDS)
def test_bits_of_the_plain_kernels_by_blocks(end: str, width: int) -> None:
    """Scales are powers of two, so that sums stay exact."""
    for m, n, k in ((256, 512, 384), (1000, 1008, 272), (65, 48, 33)):
        a, b, blocks = integers(m, k), integers(n, k).t(), -(-k // 128)
        scales = powers(m, blocks), powers(blocks, -(-n // width))
        same_bits(a, b, scales, end, "specialized_blocked", "blocked", block_a=(1, 128), block_b=(128, width))


def powers(*shape: int) -> Tensor:
    return torch.exp2(torch.randint(-2, 3, shape, device="cuda").float())


def same_bits(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], end: str, ours: str, plain: str, **options: Any) -> None:
    """Of both configurations, the record included."""
    made = [ended(ENDS[end], b.shape[-1]) for _ in range(2)]
    found, wanted = (
        scaled_mm(a, b, *scales, config=CONFIGS[name], **options, **each) for name, each in zip((ours, plain), made, strict=True)
    )
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), (a.shape, b.shape)
    if "record" in made[0]:
        assert torch.equal(made[0]["record"], made[1]["record"])
        assert float(made[0]["record"]) > 0


@pytest.mark.gpu
def test_batches_and_strides() -> None:
    one = torch.ones((), device="cuda")
    a, b = integers(3, 384, 192), integers(3, 320, 192).mT
    rows = torch.rand(3, 384, 1, device="cuda")
    for left, right, scale in ((a, b, one), (a, b, rows), (a, b[0], rows), (a[:, :, 16:80], b[:, 16:80], one)):
        same_bits(left, right, (scale, one), "fp32", "specialized", "precise", accumulate="precise")
    for left, right in ((a, b), (a, b[0])):
        scales = powers(3, 384, 2), powers(*right.shape[:-2], 2, 3)
        same_bits(left, right, scales, "fp32", "specialized_blocked", "blocked", block_a=(1, 128), block_b=(128, 128))
    single = powers(384, 2), powers(2, 320)  # one for each column, shared by all batches
    same_bits(a, b[0], single, "fp32", "specialized_blocked", "blocked", block_a=(1, 128), block_b=(128, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("block_a", [(1, 128), (128, 128), (1, 32), (1, 256), None], ids=str)
@pytest.mark.parametrize("block_b", [(128, 128), (128, 1), (64, 256), None], ids=str)
def test_block_scales(block_a: Block | None, block_b: Block | None) -> None:
    if block_a is None and block_b is None:
        return
    for m, n, k in ((256, 512, 384), (1000, 1008, 272), (2050, 1040, 1000), (300, 520, 100)):
        a, b = operands(m, n, k, (E4, E5), "cuda")
        scale_a = torch.rand(-(-m // block_a[0]), -(-k // block_a[1]), device="cuda") + 0.5 if block_a else torch.ones((), device="cuda")
        scale_b = torch.rand(-(-k // block_b[0]), -(-n // block_b[1]), device="cuda") + 0.5 if block_b else torch.ones((), device="cuda")
        c = scaled_mm(a, b, scale_a, scale_b, None, torch.float32, block_a=block_a, block_b=block_b, config=BLOCKED)
        check(c, a, b, scale_a, scale_b, block_a=block_a, block_b=block_b)


@pytest.mark.gpu
def test_within_the_bound() -> None:
    for m, n, k in ((2048, 4096, 4096), (4100, 2056, 1000)):
        a, b = operands(m, n, k, (E5, E4), "cuda")
        rows, columns, bias = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda"), torch.randn(n, device="cuda")
        c = scaled_mm(a, b, rows, columns, bias, torch.float32, "precise", config=SPECIALIZED)
        check(c, a, b, rows, columns, bias, "precise")


@pytest.mark.gpu
def test_more_than_2_to_31_outputs() -> None:
    """Random bits belong to an element's index, which needs 64 bits here; and so does its place."""
    needs_memory(10)
    m, n, one = 2**16 + 128, 2**15 + 256, torch.ones((), device="cuda")
    a, b = integers(m, 32), integers(n, 32).t()
    how = Rounding("stochastic", "nonfinite", torch.tensor([3, 1, 4], device="cuda"), 7)
    found = scaled_mm(a, b, one, one, accumulate="precise", out_format="e5m2", how=how, config=SPECIALIZED)
    wanted = scaled_mm(a, b, one, one, accumulate="precise", out_format="e5m2", how=how, config=CONFIGS["precise"])
    for first in range(0, m, 8192):
        assert torch.equal(found[first : first + 8192].view(torch.uint8), wanted[first : first + 8192].view(torch.uint8)), first


@pytest.mark.gpu
def test_a_captured_graph_replays() -> None:
    a, b, one = integers(1024, 512), integers(4096, 512).t(), torch.ones((), device="cuda")
    wanted = scaled_mm(a, b, one, one, accumulate="precise")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = scaled_mm(a, b, one, one, accumulate="precise")
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)


def test_what_is_chosen() -> None:
    assert choose(8192, 4096, 1, "precise", 132) == ("specialized", "precise")
    assert choose(8192, 4096, 1, "blocked", 132) == ("specialized_blocked", "blocked")
    assert choose(512, 512, 1, "blocked", 132) == ("blocked",)
    assert choose(512, 512, 1, "precise", 132) == ("small",)
    assert choose(8192, 4096, 1, "fast", 132) == ("large",)
    for sums in ("fast", "precise", "blocked"):
        for m, n in ((16, 64), (64, 16), (128, 256), (2048, 1024), (8192, 14336)):
            assert not CONFIGS[choose(m, n, 1, sums, 132)[-1]].specialized, "the last runs everywhere"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels whose launch was asked for; Gluon's do not compile."""
    names: list[str] = []

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.__name__)
        if kernel.__name__ == "specialized_mm_kernel":
            raise KernelCompileError("no Gluon in this Triton")

    monkeypatch.setattr(scaled_mm_launch, "launch", launch)
    monkeypatch.setattr(scaled_mm_launch, "multiprocessors", lambda device: 132)
    return names


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(E5)


@needs_gluon
def test_what_does_not_compile_is_replaced(launched: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """And said once."""
    one = torch.ones(())
    scaled_mm_launch._replaced.cache_clear()
    for _ in range(2):
        scaled_mm(codes(2048, 64), codes(2048, 64).t(), one, one, accumulate="precise")
    assert launched == ["specialized_mm_kernel", "scaled_mm_kernel"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "fp8fx: a plain kernel replaces the specialized one, slower. no Gluon in this Triton"
    ]
    launched.clear()
    scaled_mm(codes(2048, 128), codes(2048, 128).t(), torch.ones(2048, 1), torch.ones(1, 16), block_a=(1, 128), block_b=(128, 128))
    assert launched == ["specialized_mm_kernel", "blocked_mm_kernel"]


def test_an_output_that_the_copy_engine_cannot_store(launched: list[str]) -> None:
    """2041 columns of bf16: rows are no multiple of 16 bytes apart. And 1,000 rows: tiles would reach into the next batch."""
    one = torch.ones(())
    scaled_mm(codes(2048, 64), codes(2041, 64).t(), one, one, accumulate="precise")
    scaled_mm(codes(4, 1000, 64), codes(2048, 64).t(), one, one, accumulate="precise")
    assert launched == ["scaled_mm_kernel"] * 2
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        scaled_mm(codes(2048, 64), codes(2041, 64).t(), one, one, accumulate="precise", config=SPECIALIZED)
    with pytest.raises(KernelError, match="precise sums or blocks"):
        scaled_mm(codes(2048, 64), codes(2048, 64).t(), one, one, config=SPECIALIZED)


def test_a_triton_without_gluon(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_mm_launch, "SPECIALIZED", None)
    scaled_mm(codes(2048, 64), codes(2048, 64).t(), torch.ones(()), torch.ones(()), accumulate="precise")
    assert launched == ["scaled_mm_kernel"]


@needs_gluon
def test_a_gluon_that_has_changed(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What its descriptors want is found out when one is made: the plain kernel runs then too."""

    def described(*args: Any) -> None:
        raise TypeError("__init__() missing 1 required positional argument")

    monkeypatch.setattr(scaled_mm_launch.SPECIALIZED, "described", described)
    scaled_mm(codes(2048, 64), codes(2048, 64).t(), torch.ones(()), torch.ones(()), accumulate="precise")
    assert launched == ["scaled_mm_kernel"]


@needs_gluon
def test_scales_of_each_column_that_cannot_be_read(launched: list[str]) -> None:
    """Rows of scales 2042 apart, and scales of each batch: the plain kernel takes them."""
    scale_a, options = torch.ones(2048, 1), {"block_a": (1, 128), "block_b": (128, 1)}
    scaled_mm(codes(2048, 256), codes(2048, 256).t(), torch.ones(2048, 2), torch.ones(2, 2050)[:, :2048], **options)  # type: ignore[arg-type]
    scaled_mm(codes(2, 1920, 128), codes(2048, 128).t(), torch.ones(2, 1920, 1), torch.ones(2, 1, 2048), **options)  # type: ignore[arg-type]
    assert launched == ["blocked_mm_kernel"] * 2
    scaled_mm(codes(2048, 128), codes(2048, 128).t(), scale_a, torch.ones(1, 2048), **options)  # type: ignore[arg-type]
    assert launched[2:] == ["specialized_mm_kernel", "blocked_mm_kernel"]
