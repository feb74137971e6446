"""What ends scaled_mm's tiles: activation, FP8 codes or values, amax; against the composition of the reference operators.

Operands are small integers, whose sums every accumulator holds exactly, under scales that are powers of two: codes are equal byte for
byte, whether or not a compiler contracts the product with the scale and the sum with the bias.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import nearly_the_codes, random_bits, same_bytes, same_floats
from torch import Tensor
from torch.nn import functional as F

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import dequantize_tensor, quantize_scaled

pytest.importorskip("triton")
from fp8fx.kernels.cast import Rounding
from fp8fx.kernels.scaled_mm import scaled_mm

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}


def integers(shape: tuple[int, ...], device: str, dtype: torch.dtype = E4) -> Tensor:
    return torch.randint(-2, 3, shape, device=device).float().to(dtype)


def sizes(device: str) -> list[tuple[int, int, int]]:
    """Of which the second runs transposed, and the third is stored through pointers."""
    small = [(70, 48, 64), (5, 36, 64), (66, 37, 17)]
    return small if device == "cpu" else [*small, (1000, 1000, 250), (512, 1024, 256), (33, 4096, 256), (4224, 4096, 64)]


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2"])
def test_codes_and_values(device: str, format: str, rounding: str) -> None:
    rng, key = torch.tensor([21, 22, 23]), 0x89ABCDEF
    for i, (m, n, k) in enumerate(sizes(device)):
        overflow, out_scale = (("saturate", 0.37), ("nonfinite", None), ("nonfinite", 1e-3))[i % 3]
        a, b, bias = integers((m, k), device), integers((n, k), device, E5).t(), torch.randn(n, device=device)
        scale_a, scale_b = torch.tensor(0.5, device=device), torch.tensor(0.25, device=device)
        if i % 2:
            scale_a = torch.exp2(torch.randint(-3, 3, (m, 1), device=device).float())
        y = ((a.float() @ b.float()) * (scale_a * scale_b) + bias).cpu()
        given = None if out_scale is None else torch.tensor(out_scale)
        bits = random_bits(y.shape, rng, key) if rounding == "stochastic" else None
        expected = quantize_scaled(y, formats.get(format), given, "tensor", rounding, overflow, bits)
        how = {"out_scale": None if given is None else given.to(device), "how": Rounding(rounding, overflow, rng.to(device), key)}
        record = torch.zeros(1, device=device)
        codes = scaled_mm(a, b, scale_a, scale_b, bias, out_format=format, record=record, **how)
        same_bytes(codes, expected)
        same_floats(record[0], numerics.amax(y))
        for dtype in (torch.bfloat16, torch.float32):
            values = scaled_mm(a, b, scale_a, scale_b, bias, dtype, round_to=format, **how)
            assert values.dtype == dtype
            wanted = dequantize_tensor(codes.cpu(), given, format, "tensor", torch.float32)
            if device == "cpu" and dtype == torch.bfloat16:  # where the interpreter truncates
                wanted = (wanted.view(torch.int32) & -65536).view(torch.float32)
            torch.testing.assert_close(values.cpu(), wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(device: str, activation: str) -> None:
    one = torch.ones((), device=device)
    for m, n, k in sizes(device):
        a, b, bias = integers((m, k), device), integers((n, k), device).t(), torch.randn(n, device=device)
        y = ACTIVATIONS[activation](a.float() @ b.float() * 0.125 + bias)
        record = torch.zeros(3, device=device)
        out = scaled_mm(a, b, one * 0.125, one, bias, torch.float32, activation=activation, record=record)
        torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(record, torch.stack([numerics.amax(y), one * 0, one * 0]), rtol=1e-5, atol=0)
        codes = scaled_mm(a, b, one * 0.125, one, bias, activation=activation, out_format="e4m3fn", out_scale=one * 0.01)
        nearly_the_codes(codes, y, "e4m3fn", one.cpu() * 0.01)


def test_batches_and_blocks(device: str) -> None:
    """One scale per block goes through the other kernel; random bits count through batches."""
    rng = torch.tensor([1, 2, 3], device=device)
    how = Rounding("stochastic", "saturate", rng, 5)
    one = torch.ones((), device=device)
    for m in (40, 70):
        a, b = integers((2, m, 128), device), integers((2, 36, 128), device).mT
        y = (a.float() @ b.float()).cpu()
        expected = quantize_scaled(y, formats.get("e5m2"), None, "tensor", "stochastic", "saturate", random_bits(y.shape, rng.cpu(), 5))
        record = torch.zeros((), device=device)
        same_bytes(scaled_mm(a, b, one, one, out_format="e5m2", how=how, record=record), expected)
        same_floats(record, numerics.amax(y))
        scales = torch.ones(2, m, 1, device=device), torch.ones(2, 1, 36, device=device)
        blocks = {"block_a": (1, 128), "block_b": (128, 1)}
        same_bytes(scaled_mm(a, b, *scales, out_format="e5m2", how=how, **blocks), expected)


def test_what_is_outside_does_not_count(device: str) -> None:
    """Beyond the last row the sums are 0, or another batch's, and the bias alone would be larger than any output."""
    a, b = torch.ones(2, 5, 16, device=device).to(E4), torch.full((36, 16), -5.0, device=device).to(E4).t()
    one, bias = torch.ones((), device=device), torch.full((36,), 100.0, device=device)
    for rows in (a, a.repeat(1, 15, 1)):  # transposed and not
        record = torch.zeros(1, device=device)
        out = scaled_mm(rows, b, one, one, bias, torch.float32, record=record, activation="relu")
        assert bool((out == 20.0).all())
        assert record.tolist() == [20.0]


def test_nan_inf_and_an_empty_sum(device: str) -> None:
    one = torch.ones((), device=device)
    a = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [2.0, 1.0], [1.0, float("-inf")]], device=device).to(E5)
    b = torch.ones(2, 4, device=device).to(E4)
    for overflow, infinite in (("saturate", 57344.0), ("nonfinite", float("inf"))):
        record = torch.zeros(1, device=device)
        out = scaled_mm(a, b, one, one, None, torch.float32, round_to="e5m2", how=Rounding(overflow=overflow), record=record)
        assert bool(out[0].isnan().all())
        assert out[1:, 0].tolist() == [infinite, 3.0, -infinite]
        assert record.tolist() == [3.0]
    bias = torch.tensor([-1.0, 2.0, 600.0], device=device)
    record = torch.zeros(1, device=device)
    a, b = a[:, :0], integers((3, 0), device).t()
    out = scaled_mm(a, b, one, one, bias, activation="relu", out_format="e4m3fn", record=record)
    assert out.float().tolist() == [[0.0, 2.0, 448.0]] * 4
    assert record.tolist() == [600.0]
    assert scaled_mm(a[:0], b, one, one, out_format="e5m2").shape == (0, 3)


def test_refusals() -> None:
    one, a, b = torch.ones(()), torch.zeros(4, 8).to(E4), torch.zeros(8, 4).to(E4)
    with pytest.raises(KernelError, match="one of them"):
        scaled_mm(a, b, one, one, out_format="e5m2", round_to="e5m2")
    with pytest.raises(KernelError, match="out_scale"):
        scaled_mm(a, b, one, one, out_scale=one)
    with pytest.raises(KernelError, match="mish"):
        scaled_mm(a, b, one, one, activation="mish")
    with pytest.raises(KernelError, match="record must be float32"):
        scaled_mm(a, b, one, one, record=one.double())
    with pytest.raises(KernelError, match="e3m4"):
        scaled_mm(a, b, one, one, out_format="e3m4ieee")
