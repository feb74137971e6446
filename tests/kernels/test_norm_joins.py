"""A residual added before the norm, and the norm's backward, writing FP8: against autograd of the unfused operators."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import nearly_the_codes, nearly_transposed, same_bytes, same_floats, same_transposed, sampled_counts
from torch import Tensor
from torch.nn import functional as F

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import quantize_scaled

pytest.importorskip("triton")
from fp8fx.kernels import norm_backward, norm_statistics
from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.cast import Rounding
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast


def norm(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


Case = tuple[tuple[int, ...], torch.dtype]


def cases(device: str, small: tuple[int, ...]) -> list[Case]:
    """Shapes and dtypes. The interpreter is slow, and truncates to bfloat16."""
    shapes = [small] if device == "cpu" else [small, (1000, 1030), (2, 40, 4096)]
    return [(shape, dtype) for shape in shapes for dtype in ([torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16])]


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_add_norm(device: str, kind: str, current: bool) -> None:
    for shape, dtype in cases(device, (2, 9, 40) if current else (21, 530)):
        both = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype) + 1
        x, residual = both[..., : shape[-1]], both[..., shape[-1] :]
        weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
        made, record = torch.empty(2, device=device), torch.zeros(3, device=device)
        given = None if current else torch.tensor(0.02, device=device)
        how = {"scale": given, "current": current, "made_scale": made if current else None, "record": record, "counts": True}
        total, (q, t), mean, rstd = add_norm_cast(x, residual, weight, bias if kind == "layer" else None, "e4m3fn", kind, 1e-5, **how)
        same_floats(total, (x + residual).cpu())
        y = norm(kind, total, weight, bias)
        scale = made[0] if given is None else given
        nearly_the_codes(q, y, "e4m3fn", scale)
        nearly_transposed(t, y, "e4m3fn", scale)
        _, plain_mean, plain_rstd = norm_cast(total, weight, None, "e4m3fn", kind, 1e-5)
        torch.testing.assert_close(rstd, plain_rstd, rtol=1e-5, atol=0)
        assert (mean is None) == (kind == "rms")
        if mean is not None:
            torch.testing.assert_close(mean, plain_mean, rtol=1e-5, atol=1e-6)
        assert q is not None
        torch.testing.assert_close(record[0], numerics.amax(y), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
        if x.numel() < 2**17:  # few enough rows for the counts to be of all of them, in tiles of any height
            y, q = y.reshape(-1, shape[-1]), q.reshape(-1, shape[-1])
            assert record[1:].tolist() == sampled_counts(y, q, 32)


def test_add_norm_stochastic_and_empty(device: str) -> None:
    x, rng, key = torch.randn(20, 36, device=device), torch.tensor([3, 4, 5], device=device), 77
    how = Rounding("stochastic", "saturate", rng, key)
    total, (q, _), _, rstd = add_norm_cast(x, torch.zeros_like(x), None, None, "e5m2", how=how)
    y = total.cpu() * rstd.cpu()  # in the order of the kernel
    expected = quantize_scaled(
        y, formats.get("e5m2"), None, "tensor", "stochastic", "saturate", numerics.philox_bits((20, 36), 3, key, 4, 5)
    )
    same_bytes(q, expected)
    total, _, mean, _ = add_norm_cast(x[:0], x[:0], None, None, "e4m3fn", "layer")
    assert total.shape == (0, 36)
    assert mean is not None


@pytest.mark.parametrize("form", ["delayed", "current", "current in chunks"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_backward(device: str, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "current in chunks":
        monkeypatch.setattr(norm_statistics, "_MOST", 64)
    for shape, dtype in cases(device, (35, 140) if form == "current in chunks" else (2, 37, 40)):
        x = (torch.randn(shape, device=device) * 2 + 1).to(dtype).requires_grad_()
        weight, bias = (torch.randn(shape[-1], device=device).to(dtype).requires_grad_() for _ in range(2))
        dy, add = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        y = norm(kind, x, weight, bias if kind == "layer" else None)
        dx, dw, *db = torch.autograd.grad(y, (x, weight, bias) if kind == "layer" else (x, weight), dy)
        dx = dx + add
        _, mean, rstd = norm_cast(x.detach(), None, None, "e4m3fn", kind, 1e-5)
        made, record, total = torch.empty(2, device=device), torch.zeros(3, device=device), torch.empty(shape[-1], device=device)
        given = torch.tensor(0.01, device=device) if form == "delayed" else None
        how = {"scale": given, "current": given is None, "made_scale": made if given is None else None, "record": record, "counts": True}
        weight_grad, bias_grad = torch.empty_like(weight), torch.empty(shape[-1], device=device)
        grads = {"weight_grad": weight_grad, "bias_grad": bias_grad if kind == "layer" else None, "row_sum": total}
        (q, t), written = norm_backward_cast(dy, x.detach(), weight.detach(), mean, rstd, "e5m2", add=add, write=True, **how, **grads)
        rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(written, dx, rtol=rtol, atol=rtol)
        assert written is not None
        scale = made[0] if given is None else given
        expected = quantize_scaled(written.cpu(), formats.get("e5m2"), scale.cpu())  # of what was written, byte for byte
        same_bytes(q, expected)
        same_transposed(t, expected)
        torch.testing.assert_close(weight_grad, dw, rtol=rtol, atol=10 * rtol)
        torch.testing.assert_close(total, written.float().reshape(-1, shape[-1]).sum(0), rtol=1e-4, atol=1e-3)
        if db:
            torch.testing.assert_close(bias_grad, db[0].float(), rtol=rtol, atol=10 * rtol)
        # Two kernels find it, which may contract a product and a sum differently.
        torch.testing.assert_close(record[0], numerics.amax(written), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
        if given is None:
            same_floats(made, torch.stack([numerics.compute_scale(record[0].cpu(), "e5m2"), record[0].cpu()]))
        assert q is not None
        if x.numel() < 2**17:
            assert record[1:].tolist() == sampled_counts(written.reshape(-1, shape[-1]), q.reshape(-1, shape[-1]), 32)
        alone, again = norm_backward_cast(dy, x.detach(), weight.detach(), mean, rstd, None, add=add)
        assert alone == (None, None)
        assert again is not None
        torch.testing.assert_close(again, written, rtol=rtol, atol=rtol)


def test_backward_of_the_rounded_form(device: str) -> None:
    """Llama's RMSNorm, n rounded before the weight: g and n of the weight's gradient are rounded too. float32 rounds nothing."""
    x, dy, weight = torch.randn(9, 40, device=device), torch.randn(9, 40, device=device), torch.randn(40, device=device)
    _, _, rstd = norm_cast(x, weight, None, "e4m3fn", round_first=True)
    _, plain = norm_backward_cast(dy, x, weight, None, rstd, "e5m2", write=True)
    _, rounded = norm_backward_cast(dy, x, weight, None, rstd, None, round_first=True)
    assert plain is not None
    assert rounded is not None
    torch.testing.assert_close(plain, rounded, rtol=1e-5, atol=1e-6)
    if device == "cuda":  # the interpreter truncates
        x, dy, weight, out = x.bfloat16(), dy.bfloat16(), weight.bfloat16(), torch.empty(40, device=device)
        norm_backward_cast(dy, x, weight, None, rstd, "e5m2", round_first=True, weight_grad=out)
        expected = (dy.float() * (x.float() * rstd).bfloat16().float()).sum(0)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    _, dx = norm_backward_cast(dy[:0], x[:0], weight, None, rstd[:0], "e5m2", weight_grad=weight, write=True)
    assert dx is not None
    assert float(weight.abs().max()) == 0.0


def test_refusals() -> None:
    x, rstd = torch.ones(4, 4), torch.ones(4, 1)
    with pytest.raises(KernelError, match="must agree"):
        add_norm_cast(x, x[:2], None, None, "e4m3fn")
    with pytest.raises(KernelError, match="must be like x"):
        norm_backward_cast(x[:2], x, None, None, rstd, "e5m2")
    with pytest.raises(KernelError, match=r"\[\.\.\., M, 1\]"):
        norm_backward_cast(x, x, None, None, rstd[:2], "e5m2")
    with pytest.raises(KernelError, match="without a format"):
        norm_backward_cast(x, x, None, None, rstd, None, torch.ones(()))
    assert norm_backward._CONFIG[0] % 4 == 0
