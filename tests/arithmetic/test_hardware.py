"""The model of Hopper's FP8 sums against the tensor cores of a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from fp8fx.arithmetic import matmul

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("k", [32, 64, 512, 4096])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_fast_accumulation(k: int, spread: float) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the model is Hopper's")
    generator = torch.Generator().manual_seed(k)
    a, b = ((torch.randn(64, k, generator=generator) * spread).clamp(-448, 448).to(torch.float8_e4m3fn).cuda() for _ in range(2))
    one = torch.ones((), device="cuda")
    measured = torch._scaled_mm(a, b.mT, one, one, out_dtype=torch.float32, use_fast_accum=True)
    modelled = matmul(a, b.mT, "accumulate=hopper_fast")
    exact = a.double() @ b.double().mT
    same = (measured == modelled).float().mean().item()
    print(f"k {k}, spread {spread}: {same:.4f} same bits; largest difference {(measured - modelled).abs().max().item():.3e} of"
          f" {exact.abs().max().item():.3e}; error of hardware {(measured - exact).norm() / exact.norm():.3e}, of the model"
          f" {(modelled - exact).norm() / exact.norm():.3e}")  # fmt: skip
    assert same == 1.0
