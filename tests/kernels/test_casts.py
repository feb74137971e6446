"""amax, scales, casts and block casts: byte for byte what fp8fx.numerics says. On a GPU, and in the interpreter (see conftest)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_checks import every_16_bits, needs_memory, random_bits, same_bytes, same_floats, same_transposed, specials

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import quantize_scaled
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels.amax import amax, amax_each
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.scale import compute_scale

FORMATS = ("e4m3fn", "e5m2")
OVERFLOWS = ("saturate", "nonfinite")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


SHAPES = [(1, 1), (66, 131), (2, 3, 8, 36)]


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cast_and_transpose(device: str, shape: tuple[int, ...], format: str, overflow: str) -> None:
    for dtype in DTYPES:
        x = specials(torch.randn(shape) * 3).to(dtype)
        if dtype == torch.float16:  # its conversion to float32 may or may not keep the sign
            x[x.isnan()] = math.nan
        scale, largest = torch.tensor(0.0123), torch.zeros(())
        expected = quantize_scaled(x, formats.get(format), scale, overflow=overflow)
        measured = largest.to(device)
        q, t = cast(x.to(device), format, scale.to(device), layout="both", how=Rounding(overflow=overflow), amax=measured)
        same_bytes(q, expected)
        same_transposed(t, expected)
        same_floats(measured, numerics.amax(x))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_shares_its_decisions(device: str, shape: tuple[int, ...], format: str) -> None:
    x, scale = specials(torch.randn(shape)), torch.tensor(0.37)
    rng, key = torch.tensor([0x1234567_89ABCDEF, 7, 3]), 0xDEADBEEF
    for overflow in OVERFLOWS:
        bits = random_bits(x.shape, rng, key)
        expected = quantize_scaled(x, formats.get(format), scale, "tensor", "stochastic", overflow, bits)
        how = Rounding("stochastic", overflow, rng.to(device), key)
        q, t = cast(x.to(device), format, scale.to(device), layout="both", how=how)
        same_bytes(q, expected)
        same_transposed(t, expected)
        same_bytes(cast(x.to(device), format, scale.to(device), layout="rows", how=how)[0], expected)


@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
@pytest.mark.parametrize("format", FORMATS)
def test_layouts_without_a_scale_and_per_row_or_column(device: str, format: str, layout: str) -> None:
    x = specials(torch.randn(65, 140) * 100).to(torch.bfloat16)
    for granularity, scale in (("tensor", None), ("row", torch.rand(65, 1) + 0.1), ("column", torch.rand(1, 140) + 0.1)):
        expected = quantize_scaled(x, formats.get(format), scale, "row")
        q, t = cast(x.to(device), format, None if scale is None else scale.to(device), granularity, layout)
        assert (q is None) == (layout == "transposed")
        assert (t is None) == (layout == "rows")
        if q is not None:
            same_bytes(q, expected)
        if t is not None:
            same_transposed(t, expected)


@pytest.mark.parametrize("strided", ["transposed", "sliced", "expanded", "stepped"])
def test_strided_inputs(device: str, strided: str) -> None:
    base = torch.randn(150, 90)
    x = {"transposed": base.t(), "sliced": base[3:70, 5:41], "expanded": base[0].expand(33, 90), "stepped": base[::2, ::3]}[strided]
    x = x.to(device)
    expected = quantize_scaled(x.cpu(), formats.get("e4m3fn"), torch.tensor(0.1))
    q, t = cast(x, "e4m3fn", torch.tensor(0.1, device=device), layout="both")
    same_bytes(q, expected)
    same_transposed(t, expected)
    same_floats(amax(x), numerics.amax(x.cpu()))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 7)], ids=str)
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device)
    assert float(amax(x)) == 0.0
    q, t = cast(x, "e5m2", torch.ones((), device=device), layout="both" if len(shape) > 1 else "rows")
    assert q is not None
    assert q.shape == x.shape
    made = cast_current(x, "e4m3fn", "tensor")
    same_floats(made.scale, numerics.compute_scale(torch.zeros(()), "e4m3fn"))
    if len(shape) > 1:
        assert t is not None
        assert t.shape == x.mT.shape
        assert cast_block(x, "e4m3fn", layout="both").q_t is not None


@pytest.mark.parametrize("shape", [(5,), (70, 150), (3, 37, 20), (4, 4096)], ids=str)
def test_amax(device: str, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = specials(torch.randn(shape) * 5).to(dtype)
        same_floats(amax(x.to(device)), numerics.amax(x))
        if len(shape) > 1:
            row, column = amax_each(x.to(device), ("row", "column"))
            same_floats(row, numerics.amax(x, "row"))
            same_floats(column, numerics.amax(x, "row", (-2,)))
    nothing_finite = torch.full(shape, math.nan)
    same_floats(amax(nothing_finite.to(device)), torch.zeros(()))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_scales(device: str, format: str, power_of_two: bool) -> None:
    special = torch.tensor([0.0, math.inf, math.nan, 1e-45, 1e-38, 2.0**-126, 1e-12, 448.0, 449.0, 57344.0, 3.4e38, 0.001, 1.0, 3.0])
    largest = torch.cat([special, torch.randn(2000).abs() * torch.logspace(-37, 37, 2000)])
    for eps in (1e-12, 0.0):
        same_floats(
            compute_scale(largest.to(device), format, power_of_two, eps), numerics.compute_scale(largest, format, power_of_two, eps)
        )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_current_scaling(device: str, granularity: str, power_of_two: bool) -> None:
    dims = (-2,) if granularity == "column" else (-1,)
    for shape, format in ((70, 150), "e4m3fn"), ((2, 33, 64), "e5m2"):
        x = (torch.randn(shape) * torch.rand(shape[-1])).to(torch.bfloat16)
        x[..., 4, 7], x[..., 5, 8] = math.nan, math.inf
        x[..., 6, :] = 0.0
        spec = TensorSpec(format=format, granularity="tensor" if granularity == "tensor" else "row", power_of_two=power_of_two)
        q, scale, largest = numerics.quantize_tensor(x, spec, dims)
        made = cast_current(x.to(device), format, granularity, layout="both", power_of_two=power_of_two)
        same_bytes(made.q, q)
        same_transposed(made.q_t, q)
        for actual, expected in ((made.scale, scale), (made.scale_t, scale), (made.amax, largest)):
            same_floats(actual, expected)


def test_each_layout_with_scales_along_its_contraction(device: str) -> None:
    x, spec = torch.randn(70, 150).to(torch.bfloat16), TensorSpec(format="e4m3fn", granularity="row", power_of_two=True)
    made = cast_current(x.to(device), "e4m3fn", "row", "column", "both", power_of_two=True)
    for q, scale, dims in ((made.q, made.scale, (-1,)), (None if made.q_t is None else made.q_t.mT, made.scale_t, (-2,))):
        expected, wanted, _ = numerics.quantize_tensor(x, spec, dims)
        assert q is not None
        same_bytes(q.contiguous(), expected)
        same_floats(scale, wanted)
    two = cast_current(x[:2].to(device), "e4m3fn", "row", "column", "both", power_of_two=True)  # two scales, no scale and its amax
    same_bytes(two.q, numerics.quantize_tensor(x[:2], spec, (-1,))[0])
    alone = cast_current(x.to(device), "e4m3fn", "row", "column", "transposed", power_of_two=True)
    assert alone.q is None
    assert made.q_t is not None
    same_transposed(alone.q_t, made.q_t.cpu().mT)


@pytest.mark.parametrize("shape", [(2, 9, 200), (5, 9000), (3, 17)], ids=str)
def test_rows_in_one_read(device: str, shape: tuple[int, ...]) -> None:
    """Codes in x's own layout under scales per row: a kernel of its own."""
    rng, key = torch.tensor([5, 6, 7]), 99
    wide = specials(torch.randn(*shape[:-1], shape[-1] + 24)).to(torch.bfloat16)
    wide[..., 1, :] = 0.0
    for x, (rounding, format, power_of_two) in itertools.product(
        (wide[..., : shape[-1]].contiguous(), wide[..., 8 : shape[-1] + 8]),
        (("nearest_even", "e4m3fn", False), ("stochastic", "e5m2", True)),
    ):
        spec = TensorSpec(format=format, granularity="row", rounding=rounding, overflow="nonfinite", power_of_two=power_of_two)
        bits = random_bits(x.shape, rng, key) if rounding == "stochastic" else None
        expected, scale, largest = numerics.quantize_tensor(x, spec, (-1,), bits)
        how, record = Rounding(rounding, "nonfinite", rng.to(device), key), torch.zeros(1, device=device)
        there = wide.to(device)[..., 8 : shape[-1] + 8] if not x.is_contiguous() else x.to(device)
        made = cast_current(there, format, "row", how=how, power_of_two=power_of_two, record=record)
        same_bytes(made.q, expected)
        same_floats(made.scale, scale)
        same_floats(made.amax, largest)
        same_floats(record[0], largest.max())


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1), (1, 32), (64, 64)], ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 40)], ids=str)
def test_blocks(device: str, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    rng, key = torch.tensor([5, 6, 7]), 99
    for rounding, power_of_two in (("nearest_even", False), ("stochastic", True)):
        x = specials(torch.randn(shape)).to(torch.bfloat16)
        bits = random_bits(x.shape, rng, key) if rounding == "stochastic" else None
        how = Rounding(rounding, "saturate", rng.to(device), key)
        made = cast_block(x.to(device), "e4m3fn", block, layout="both", how=how, power_of_two=power_of_two)
        sides = ((made.q, made.scale, made.amax, block), (made.q_t, made.scale_t, made.amax_t, block[::-1]))
        for i, (codes, scale, largest, each) in enumerate(sides):
            spec = TensorSpec(format="e4m3fn", granularity=each, rounding=rounding, power_of_two=power_of_two)
            q, wanted, biggest = numerics.quantize_tensor(x, spec, random_bits=bits)
            (same_transposed if i else same_bytes)(codes, q)
            same_floats(scale, wanted)
            same_floats(largest, biggest)
    same_bytes(cast_block(x.to(device), "e5m2", block).q, numerics.quantize_tensor(x, TensorSpec(format="e5m2", granularity=block))[0])


def test_amax_is_merged(device: str) -> None:
    x, largest = torch.ones(10, 20, device=device), torch.tensor(0.5, device=device)
    for scale, expected in ((3.0, 3.0), (2.0, 3.0), (-7.0, 7.0)):
        cast(x * scale, "e4m3fn", torch.ones((), device=device), amax=largest)
        assert float(largest) == expected


def test_refusals() -> None:
    x = torch.ones(4, 4)
    with pytest.raises(KernelError, match="float64"):
        cast(x.double(), "e4m3fn")
    with pytest.raises(KernelError, match="e3m4ieee"):
        cast(x, "e3m4ieee")
    with pytest.raises(KernelError, match="1 elements"):
        cast(x, "e4m3fn", torch.ones(4, 1))
    with pytest.raises(KernelError, match="S one of"):
        cast_block(x, "e4m3fn", (1, 100))
    with pytest.raises(KernelError, match="nearest_even"):
        Rounding("up")
    with pytest.raises(KernelError, match="rng"):
        Rounding("stochastic")


@pytest.mark.gpu
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("format", FORMATS)
def test_all_16_bit_inputs(format: str, overflow: str) -> None:
    rng = torch.tensor([11, 12, 13])
    bits = random_bits(torch.Size((256, 256)), rng, 5)
    for dtype, scale in itertools.product((torch.bfloat16, torch.float16), (None, 1.0, 0.0123, 2.0**-100, 3e20)):
        x = every_16_bits(dtype)
        given = None if scale is None else torch.tensor(scale)
        on_device = None if given is None else given.cuda()
        for rounding in ("nearest_even", "stochastic"):
            expected = quantize_scaled(x, formats.get(format), given, "tensor", rounding, overflow, bits)
            q, t = cast(x.cuda(), format, on_device, layout="both", how=Rounding(rounding, overflow, rng.cuda(), 5))
            same_bytes(q, expected)
            same_transposed(t, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_all_bfloat16_inputs_in_every_form(format: str) -> None:
    """What cast's one scale in both layouts leaves out: long rows, scales per row, column and block, scales made on the way."""
    x = every_16_bits(torch.bfloat16)
    x = x[:, torch.randperm(256)]  # so that each row and block has some large values
    on_device = x.cuda()
    for overflow in OVERFLOWS:
        how = Rounding(overflow=overflow)
        same_bytes(
            cast(on_device.view(-1), format, None, how=how)[0], quantize_scaled(x.view(-1), formats.get(format), None, overflow=overflow)
        )
        for granularity, scale in (("row", torch.rand(256, 1) + 0.1), ("column", torch.rand(1, 256) + 0.1)):
            expected = quantize_scaled(x, formats.get(format), scale, "row", overflow=overflow)
            q, t = cast(on_device, format, scale.cuda(), granularity, "both", how)
            same_bytes(q, expected)
            same_transposed(t, expected)
        for power_of_two in (False, True):
            for granularity in ("tensor", "row", (1, 128), (128, 128), (128, 1)):
                spec = TensorSpec(format=format, granularity=granularity, overflow=overflow, power_of_two=power_of_two)
                expected, scale, largest = numerics.quantize_tensor(x, spec)
                if isinstance(granularity, tuple):
                    made = cast_block(on_device, format, granularity, how=how, power_of_two=power_of_two)
                else:
                    made = cast_current(on_device, format, granularity, layout="both", how=how, power_of_two=power_of_two)
                    same_transposed(made.q_t, expected)
                same_bytes(made.q, expected)
                same_floats(made.scale, scale)
                same_floats(made.amax, largest)


@pytest.mark.gpu
def test_small_and_odd_sizes() -> None:
    rng, key = torch.tensor([31, 32, 33]), 3
    for i, (m, n) in enumerate(itertools.product((1, 7, 17, 1000), repeat=2)):
        for shape in ((m, n), (3, m, n)):
            x, format, rounding = (
                specials(torch.randn(shape)).to(torch.bfloat16),
                FORMATS[i % 2],
                ("nearest_even", "stochastic")[i // 2 % 2],
            )
            bits = random_bits(x.shape, rng, key) if rounding == "stochastic" else None
            expected = quantize_scaled(x, formats.get(format), torch.tensor(0.1), "tensor", rounding, "saturate", bits)
            how = Rounding(rounding, "saturate", rng.cuda(), key)
            for layout in ("both", "rows"):
                q, t = cast(x.cuda(), format, torch.tensor(0.1).cuda(), layout=layout, how=how)
                same_bytes(q, expected)
            q, t = cast(x.cuda(), format, torch.tensor(0.1).cuda(), layout="both", how=how)
            same_transposed(t, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_random_float32_and_every_tie(format: str) -> None:
    grid = torch.tensor(formats.get(format).finite_values(), dtype=torch.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([grid, middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))])
    x = torch.cat([near, torch.randint(-(2**31), 2**31 - 1, (1 << 20,), dtype=torch.int64).to(torch.int32).view(torch.float32)])
    for overflow in OVERFLOWS:
        q, _ = cast(x.cuda(), format, None, how=Rounding(overflow=overflow))
        same_bytes(q, quantize_scaled(x, formats.get(format), None, overflow=overflow))


@pytest.mark.gpu
def test_more_than_2_to_31_elements() -> None:
    needs_memory(20)
    rows, columns = 70_000, 32_768  # 2.3e9 elements
    x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[:] = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    x[-1, -3] = 300.0
    tail = x[-64:].cpu()
    largest = torch.zeros((), device="cuda")
    scale = torch.tensor(0.5, device="cuda")
    q, t = cast(x, "e4m3fn", scale, layout="both", amax=largest)
    assert q is not None
    assert t is not None
    expected = quantize_scaled(tail, formats.get("e4m3fn"), torch.tensor(0.5))
    same_bytes(q[-64:], expected)
    same_bytes(t[:, -64:].contiguous(), expected.mT)
    assert bool((t[:, :1].view(torch.uint8) == q[:1].view(torch.uint8).mT).all())
    assert float(largest) == 300.0 == float(amax(x))
    flat, _ = cast(x.view(-1), "e4m3fn", scale)
    assert flat is not None
    assert torch.equal(flat.view(torch.uint8), q.view(-1).view(torch.uint8))


@pytest.mark.gpu
def test_two_streams_and_a_captured_graph() -> None:
    xs = [torch.randn(512, 768, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    scale = torch.tensor(0.01, device="cuda")
    expected = [quantize_scaled(x.cpu(), formats.get("e4m3fn"), torch.tensor(0.01)) for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 2]):
            results.append(cast(x, "e4m3fn", scale, layout="both"))
    torch.cuda.synchronize()
    for (q, t), wanted in zip(results, expected, strict=True):
        same_bytes(q, wanted)
        same_transposed(t, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = cast_current(xs[0], "e4m3fn", layout="both")
    xs[0].mul_(2.0)
    graph.replay()
    same_bytes(made.q, numerics.quantize_tensor(xs[0].cpu(), TensorSpec(format="e4m3fn"))[0])
