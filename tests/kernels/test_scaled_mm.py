"""scaled_mm against float64, on a GPU and in the interpreter (see conftest), within the bound of `product_checks`."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_checks import needs_memory
from product_checks import E4, E5, PAIRS, Block, check, operands, random_codes

from fp8fx.errors import KernelError

pytest.importorskip("triton")
from fp8fx.kernels.cast import cast
from fp8fx.kernels.scaled_mm import scaled_mm
from fp8fx.kernels.scaled_mm_operands import Operand

SIZES = [(1, 1, 1), (1, 40, 64), (7, 17, 33), (130, 150, 150), (70, 48, 17)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_scales(device: str, size: tuple[int, int, int]) -> None:
    m, n, k = size
    whole_a, whole_b = torch.tensor(0.5, device=device), torch.tensor(3.0, device=device)
    rows, columns = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5
    for i, (scale_a, scale_b) in enumerate(itertools.product((whole_a, rows), (whole_b, columns))):
        a, b = operands(m, n, k, PAIRS[i], device)
        bias = torch.randn(n, device=device).to(torch.bfloat16) if i % 2 else None
        dtype = (torch.bfloat16, torch.float32, torch.float16, torch.float32)[i]
        check(scaled_mm(a, b, scale_a, scale_b, bias, dtype), a, b, scale_a, scale_b, bias)


@pytest.mark.parametrize("size", [(40, 72, 300)], ids=str)
@pytest.mark.parametrize(
    "blocks", [((1, 128), (128, 128)), ((1, 128), (128, 1)), ((128, 128), (128, 1)), ((1, 32), (64, 1)), ((1, 128), None)], ids=str
)
def test_block_scales(device: str, size: tuple[int, int, int], blocks: tuple[Block, Block | None]) -> None:
    m, n, k = size
    block_a, block_b = blocks
    a, b = operands(m, n, k, (E4, E4), device)
    scale_a = torch.rand(math.ceil(m / block_a[0]), math.ceil(k / block_a[1]), device=device) + 0.5
    scale_b = torch.rand(1, n, device=device) + 0.5
    if block_b is not None:
        scale_b = torch.rand(math.ceil(k / block_b[0]), math.ceil(n / block_b[1]), device=device) + 0.5
    bias = torch.randn(n, device=device)
    c = scaled_mm(a, b, scale_a, scale_b, bias, torch.float32, block_a=block_a, block_b=block_b)
    check(c, a, b, scale_a, scale_b, bias, block_a=block_a, block_b=block_b)


def test_strides_and_layouts(device: str) -> None:
    one = torch.ones((), device=device)
    wide = random_codes((70, 200), E4, device)
    b = random_codes((48, 64), E4, device).t()
    for a in (wide[:, :64], wide[:, 3:67], wide[::2, 16:80], wide[:64, :40].t()[:, :64].contiguous().t().t()[:, :64]):
        check(scaled_mm(a, b[: a.shape[1]], one, one, None, torch.float32), a, b[: a.shape[1]], one, one)
    row_major = random_codes((64, 48), E4, device)
    check(scaled_mm(wide[:, :64], row_major, one, one, None, torch.float32), wide[:, :64], row_major, one, one)


def test_block_scales_of_each_batch_over_shared_codes(device: str) -> None:
    a, b = random_codes((2, 70, 128), E4, device), random_codes((96, 128), E4, device).t()
    scale_a, scale_b = torch.rand(2, 70, 1, device=device) + 0.5, torch.tensor([1.0, 3.0], device=device).view(2, 1, 1)
    c = scaled_mm(a, b, scale_a, scale_b, None, torch.float32, block_a=(1, 128), block_b=(128, 128))
    for i in range(2):
        check(c[i].contiguous(), a[i], b, scale_a[i], scale_b[i], block_a=(1, 128), block_b=(128, 128))


def test_batches(device: str) -> None:
    a, b = random_codes((2, 3, 40, 64), E4, device), random_codes((2, 3, 24, 64), E5, device).mT
    one, rows = torch.ones((), device=device), torch.rand(2, 3, 40, 1, device=device) + 0.5
    check(scaled_mm(a, b, rows, one, None, torch.float32), a, b, rows, one)
    shared = random_codes((200, 64), E4, device).t()
    check(scaled_mm(a, shared, rows, one, None, torch.float32), a, shared, rows, one)
    check(scaled_mm(a[0, 0], b, one, one, None, torch.float32), a[0, 0], b, one, one)
    # Scales per row of what all batches share, and scales with strides.
    few = torch.rand(80, 1, device=device)[::2] + 0.5
    check(scaled_mm(a[0, 0], b, few, one, None, torch.float32), a[0, 0], b, few, one)
    check(scaled_mm(a[0, 0], b[0, 0], few, one, None, torch.float32), a[0, 0], b[0, 0], few, one)
    check(scaled_mm(a, b, few, one, None, torch.float32), a, b, few, one)
    turned = random_codes((3, 40, 2, 64), E4, device).permute(2, 0, 1, 3)
    check(scaled_mm(turned, b, one, one, None, torch.float32), turned, b, one, one)


@pytest.mark.parametrize("shape", [(37, 24), (2, 5, 24)], ids=str)
def test_what_casts_transpose_is_read_as_it_lies(device: str, shape: tuple[int, ...]) -> None:
    """The product over any number of rows: nothing is copied into rows that the copy engine can read."""
    one, column = torch.ones((), device=device), torch.rand(24, 1, device=device) + 0.5
    x, y = (cast(torch.randn(shape, device=device), format, layout="transposed")[1] for format in ("e4m3fn", "e5m2"))
    assert x is not None
    assert y is not None
    for scale in (one, column):
        check(scaled_mm(x, y.mT, scale, one, None, torch.float32), x, y.mT, scale, one)
        assert Operand.of(x, x.shape[:-2], scale, None).codes.data_ptr() == x.data_ptr()


def test_empty_and_special(device: str) -> None:
    one, bias = torch.ones((), device=device), torch.arange(5.0, device=device)
    assert scaled_mm(random_codes((0, 4), E4, device), random_codes((5, 4), E4, device).t(), one, one).shape == (0, 5)
    c = scaled_mm(random_codes((3, 0), E4, device), random_codes((5, 0), E4, device).t(), one, one, bias, torch.float32)
    assert torch.equal(c, bias.expand(3, 5))
    a = torch.tensor([[1.0, math.nan], [1.0, math.inf], [2.0, 1.0]], device=device).to(E5)
    c = scaled_mm(a, torch.ones(2, 4, device=device).to(E4), one, one)
    assert bool(c[0].isnan().all())
    assert bool((c[1] == math.inf).all())
    assert bool((c[2] == 3.0).all())


def test_refusals() -> None:
    one, a, b = torch.ones(()), torch.zeros(4, 8).to(E4), torch.zeros(8, 4).to(E4)
    with pytest.raises(KernelError, match="float8"):
        scaled_mm(a.float(), b, one, one)
    with pytest.raises(KernelError, match="expected"):
        scaled_mm(a, b.t(), one, one)
    with pytest.raises(KernelError, match="bias"):
        scaled_mm(a, b, one, one, torch.ones(5))
    with pytest.raises(KernelError, match="expected"):
        scaled_mm(a, b, torch.ones(3, 1), one)
    with pytest.raises(KernelError, match="multiples of 32"):
        scaled_mm(a, b, torch.ones(4, 1), one, block_a=(1, 8))


@pytest.mark.gpu
def test_small_and_odd_sizes() -> None:
    one = torch.ones((), device="cuda")
    for i, (m, n, k) in enumerate(itertools.product((1, 7, 17, 1000), repeat=3)):
        a, b = operands(m, n, k, PAIRS[i % 4], "cuda")
        accumulate = ("fast", "precise")[i // 4 % 2]
        check(scaled_mm(a, b, one, one, None, torch.float32, accumulate), a, b, one, one, None, accumulate)
        strided_a, strided_b = torch.cat([a.view(torch.uint8)] * 2, 1)[:, k:].view(a.dtype), b.contiguous()
        check(scaled_mm(strided_a, strided_b, one, one, None, torch.bfloat16, accumulate), a, b, one, one, None, accumulate)
        many = a.view(torch.uint8).expand(3, m, k).contiguous().view(a.dtype)
        c = scaled_mm(many, b, one, one, None, torch.float32, accumulate)
        assert c.shape == (3, m, n)
        check(c[2].contiguous(), a, b, one, one, None, accumulate)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", ["fast", "precise"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_real_sizes(pair: tuple[torch.dtype, torch.dtype], accumulate: str) -> None:
    for m, n, k in ((1024, 2048, 4096), (1000, 1000, 1000), (1, 4096, 4096), (33, 4096, 1000), (384, 520, 7000), (2048, 256, 17)):
        a, b = operands(m, n, k, pair, "cuda")
        scale_a, scale_b = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(1, n, device="cuda") + 0.5
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32):
            check(scaled_mm(a, b, scale_a, scale_b, bias, dtype, accumulate), a, b, scale_a, scale_b, bias, accumulate)
        one = torch.ones((), device="cuda")
        check(scaled_mm(a, b, one, one, None, torch.bfloat16, accumulate), a, b, one, one, None, accumulate)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("blocks", [((1, 128), (128, 128)), ((1, 128), (128, 1)), ((128, 128), (128, 128))], ids=str)
def test_real_sizes_with_block_scales(pair: tuple[torch.dtype, torch.dtype], blocks: tuple[Block, Block]) -> None:
    (rows_a, k_a), (k_b, columns_b) = blocks
    for m, n, k in ((1024, 2048, 4096), (1000, 1000, 1000), (17, 4096, 512)):
        a, b = operands(m, n, k, pair, "cuda")
        scale_a = torch.rand(math.ceil(m / rows_a), math.ceil(k / k_a), device="cuda") + 0.5
        scale_b = torch.rand(math.ceil(k / k_b), math.ceil(n / columns_b), device="cuda") + 0.5
        check(
            scaled_mm(a, b, scale_a, scale_b, None, torch.bfloat16, block_a=blocks[0], block_b=blocks[1]),
            a,
            b,
            scale_a,
            scale_b,
            None,
            "fast",
            *blocks,
        )


@pytest.mark.gpu
def test_precise_is_more_precise() -> None:
    """A long sum of one sign is where Hopper's accumulator loses: fast cuts each term off, precise hands over every 128."""
    a, b = operands(256, 256, 65536, (E4, E4), "cuda")
    a, b = a.float().abs().to(E4), b.float().abs().t().contiguous().to(E4).t()
    one = torch.ones((), device="cuda")
    exact = a.double() @ b.double()
    errors = [
        ((scaled_mm(a, b, one, one, None, torch.float32, how).double() - exact) / exact).abs().max().item() for how in ("fast", "precise")
    ]
    assert errors[1] < errors[0] / 10
    assert errors[1] < 128 * 2.0**-13


@pytest.mark.gpu
def test_more_than_2_to_31_outputs() -> None:
    needs_memory(24)
    m, n, k = 66_000, 33_024, 64
    a, b = operands(m, n, k, (E4, E4), "cuda")
    one = torch.ones((), device="cuda")
    c = scaled_mm(a, b, one, one)
    check(c[-200:].contiguous(), a[-200:], b, one, one)
    check(c[:200].contiguous(), a[:200], b, one, one)
    odd = scaled_mm(a, b[:, :-1], one, one)  # stored through pointers
    assert torch.equal(odd[-100:], c[-100:, :-1])


@pytest.mark.gpu
def test_two_streams_and_a_captured_graph() -> None:
    one = torch.ones((), device="cuda")
    pairs = [operands(512, 1024, 768, (E4, E5), "cuda") for _ in range(8)]
    expected = [scaled_mm(a, b, one, one) for a, b in pairs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i, (a, b) in enumerate(pairs):
        with torch.cuda.stream(streams[i % 2]):
            results.append(scaled_mm(a, b, one, one))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scaled_mm(*pairs[0], one, one)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected[0])
