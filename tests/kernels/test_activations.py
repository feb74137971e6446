"""Activations and norms that write FP8, against the unfused operators: the same codes but where a last bit moves a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import every_16_bits, nearly_the_codes, nearly_transposed, same_bytes, same_floats, same_transposed
from torch import Tensor
from torch.nn import functional as F

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import quantize_scaled
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels.activation_amax import activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.cast import Rounding, cast
from fp8fx.kernels.layout import pitch
from fp8fx.kernels.norm_cast import norm_cast

FORWARD = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(FORWARD))
def test_forward(device: str, activation: str, gated: bool) -> None:
    for shape, dtype in (((70, 150), torch.float32), ((2, 34, 33), torch.float32), ((130, 256), torch.bfloat16)):
        if device == "cpu" and dtype != torch.float32:
            continue  # the interpreter rounds to bfloat16 by truncation
        both = (torch.randn(*shape[:-1], 2 * shape[-1], device=device) * 2).to(dtype)
        h, u = both[..., : shape[-1]], both[..., shape[-1] :]
        y = FORWARD[activation](h) * u if gated else FORWARD[activation](h)
        for scale in (torch.tensor(0.013, device=device), None):
            largest = torch.zeros((), device=device)
            q, t = activation_cast(h, u if gated else None, activation, "e4m3fn", scale, amax=largest)
            nearly_the_codes(q, y, "e4m3fn", scale)
            nearly_transposed(t, y, "e4m3fn", scale)
            torch.testing.assert_close(largest, numerics.amax(y), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(FORWARD))
def test_backward(device: str, activation: str, gated: bool) -> None:
    for shape, dtype in (((70, 150), torch.float32), ((130, 256), torch.bfloat16)):
        if device == "cpu" and dtype != torch.float32:
            continue
        h, u = ((torch.randn(shape, device=device) * 2).to(dtype).requires_grad_() for _ in range(2))
        dy = torch.randn(shape, device=device).to(dtype)
        y = FORWARD[activation](h) * u if gated else FORWARD[activation](h)
        grads = torch.autograd.grad(y, (h, u) if gated else (h,), dy)
        scale, scale_u, largest, largest_u = (torch.tensor(v, device=device) for v in (1e-3, 2e-3, 0.0, 0.0))
        pairs = activation_backward_cast(
            dy, h.detach(), u.detach() if gated else None, activation, "e5m2", scale, scale_u, amax=largest, amax_u=largest_u
        )
        rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for (q, t), grad, s, seen in zip(pairs, grads, (scale, scale_u), (largest, largest_u), strict=False):
            nearly_the_codes(q, grad, "e5m2", s)
            nearly_transposed(t, grad, "e5m2", s)
            torch.testing.assert_close(seen, numerics.amax(grad), rtol=rtol, atol=0)
        assert gated or pairs[1] == (None, None)


def kept_of(x: Tensor) -> Kept:
    """What is kept of x, by the reference."""
    spec = TensorSpec(format="e4m3fn", granularity=(1, 128), power_of_two=True)
    q, scale, _ = numerics.quantize_tensor(x.cpu(), spec, (-1,))
    return Kept(q.contiguous().view(torch.uint8).to(x.device), scale.to(x.device))


def same_pairs(ours: Any, theirs: Any) -> None:
    (q, t), (expected, turned) = ours, theirs
    same_bytes(q, expected.cpu())
    same_transposed(t, turned.cpu().mT)


@pytest.mark.parametrize(
    ("activation", "gated", "shape"), [("silu", True, (34, 150)), ("gelu", False, (34, 150)), ("relu", True, (64, 128))]
)
def test_inputs_kept_in_fp8(device: str, activation: str, gated: bool, shape: tuple[int, int]) -> None:
    """Codes of h and u are the reference's, and what reads them sees their values; a gradient by two launches is that of one."""
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        h, v, dy = ((torch.randn(shape, device=device) * 2).to(dtype) for _ in range(3))
        h[0, 0], h[1, 1], h[2] = float("nan"), float("inf"), 0.0
        u = v if gated else None
        scale, amax = torch.tensor(0.013, device=device), torch.zeros((), device=device)
        plain = activation_cast(h, u, activation, "e4m3fn", scale)
        kept = Kept.empty(h), Kept.empty(v) if gated else None
        same_pairs(activation_cast(h, u, activation, "e4m3fn", scale, kept=kept, amax=amax), plain)
        for x, found in ((h, kept[0]), (v, kept[1])):
            if found is not None:
                same_bytes(found.q, kept_of(x).q.cpu())
                same_floats(found.scale, kept_of(x).scale.cpu())
        _same_in_place(h, u, activation, plain, scale, kept)
        _same_by_rows(h, u, activation, plain, scale, kept)
        seen = [
            None if x is None else numerics.dequantize_tensor(x.q.view(torch.float8_e4m3fn), x.scale, "e4m3fn", (1, 128), dtype)
            for x in kept
        ]
        assert seen[0] is not None
        scales = torch.tensor(1e-3, device=device), torch.tensor(2e-3, device=device)
        pairs = activation_backward_cast(dy, seen[0], seen[1], activation, "e5m2", *scales)
        from_kept = activation_backward_cast(dy, *kept, activation, "e5m2", *scales)
        same_pairs(from_kept[0], pairs[0])
        if not gated:
            continue
        same_pairs(from_kept[1], pairs[1])
        (largest, largest_u), sums = torch.zeros(2, device=device).unbind(), torch.empty(shape[1], device=device)
        only = activation_backward_cast(dy, *kept, activation, "e5m2", scales[0], only=True, amax=largest)
        same_pairs(only[0], pairs[0])
        assert only[1] == (None, None)
        same_pairs(activation_cast(kept[0], dy, activation, "e5m2", scales[1], amax=largest_u, bias_grad=sums), pairs[1])
        measured = activation_backward_amax(dy, *kept, activation)
        assert [float(part.max()) for part in measured if part is not None] == [float(largest), float(largest_u)]
        du = F.silu(seen[0]) * dy if activation == "silu" else F.relu(seen[0]) * dy
        torch.testing.assert_close(sums, du.float().sum(0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3, equal_nan=True)


def _same_in_place(h: Tensor, u: Tensor | None, activation: str, plain: Any, scale: Tensor, kept: tuple[Kept, Kept | None]) -> None:
    """activation_keep: a over h, then cast by the same scale; and the amax of a."""
    again, over = (Kept.empty(h), None if u is None else Kept.empty(h)), h.clone()
    parts = activation_keep(over, u, activation, again)
    assert torch.equal(again[0].q, kept[0].q)
    assert torch.equal(again[0].scale, kept[0].scale)
    if kept[1] is not None:
        assert again[1] is not None
        assert torch.equal(again[1].q, kept[1].q)
    assert float(parts.max()) == float(numerics.amax(over))
    same_pairs(cast(over, "e4m3fn", scale, layout="both"), plain)


def _same_by_rows(h: Tensor, u: Tensor | None, activation: str, plain: Any, scale: Tensor, kept: tuple[Kept, Kept | None]) -> None:
    """A whole that is made in two parts, and nothing behind it."""
    (m, k), codes = h.shape, plain[0].dtype
    room = torch.full((k + 1, pitch(m)), 0x55, dtype=torch.uint8, device=h.device)
    into = torch.empty_like(plain[0]), room[:k, :m].view(codes)
    again = Kept.empty(h), None if u is None else Kept.empty(h)
    for rows in (slice(0, 32), slice(32, None)):
        part = None if u is None else u[rows]
        activation_cast(h[rows], part, activation, "e4m3fn", scale, kept=again, into=(*into, rows.start))
    same_pairs(into, plain)
    assert bool((room[k] == 0x55).all())
    for a, b in zip(again, kept, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale))


def test_layouts_stochastic_and_special_values(device: str) -> None:
    h = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -1.0, 3.3, 500.0, -5.0]], device=device).repeat(8, 1)
    rng, key = torch.tensor([3, 4, 5], device=device), 77
    bits = numerics.philox_bits((8, 8), 3, key, 4, 5)
    for layout in ("rows", "transposed"):
        q, t = activation_cast(h, None, "relu", "e4m3fn", None, layout, Rounding("stochastic", "saturate", rng, key))
        expected = quantize_scaled(F.relu(h.cpu()), formats.get("e4m3fn"), None, "tensor", "stochastic", "saturate", bits)
        made = q if t is None else t.mT
        assert made is not None
        assert torch.equal(made.cpu().contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert activation_cast(h[:0], None, "silu", "e5m2")[0] is not None


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(device: str, kind: str) -> None:
    for shape, dtype in (((70, 150), torch.float32), ((2, 5, 300), torch.float32), ((130, 5000), torch.bfloat16)):
        if device == "cpu" and dtype != torch.float32:
            continue
        x = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
        weight, bias = torch.randn(shape[-1], device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)
        scale, largest = torch.tensor(0.02, device=device), torch.zeros((), device=device)
        if kind == "layer":
            y = F.layer_norm(x, shape[-1:], weight, bias, 1e-5)
            (q, t), mean, rstd = norm_cast(x, weight, bias, "e4m3fn", kind, 1e-5, scale, amax=largest)
            assert mean is not None
            torch.testing.assert_close(mean, x.float().mean(-1, keepdim=True), rtol=1e-5, atol=1e-5)
        else:
            y = F.rms_norm(x, shape[-1:], weight, 1e-5)
            (q, t), _, rstd = norm_cast(x, weight, None, "e4m3fn", kind, 1e-5, scale, amax=largest)
        variance = x.float().var(-1, keepdim=True, unbiased=False) if kind == "layer" else x.float().square().mean(-1, keepdim=True)
        torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)
        nearly_the_codes(q, y, "e4m3fn", scale)
        nearly_transposed(t, y, "e4m3fn", scale)
        torch.testing.assert_close(largest, numerics.amax(y), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    (q, t), _, _ = norm_cast(x[..., :0], None, None, "e4m3fn")
    assert q is not None
    assert q.numel() == 0


def test_refusals() -> None:
    with pytest.raises(KernelError, match="batch"):
        norm_cast(torch.ones(2, 2), None, None, "e4m3fn", "batch")
    with pytest.raises(KernelError, match="mish"):
        activation_cast(torch.ones(2, 2), None, "mish", "e4m3fn")
    one = torch.ones(())
    with pytest.raises(KernelError, match="together"):
        activation_backward_cast(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), "silu", "e5m2", one, None)
    codes = Kept(torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 1))
    with pytest.raises(KernelError, match=r"kept codes must be uint8 \[3, 2\] with float32 scales \[3, 1\]"):
        activation_cast(codes, torch.ones(3, 2), "silu", "e4m3fn")
    with pytest.raises(KernelError, match="both codes"):
        activation_cast(codes, codes, "silu", "e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="rows 8 to 10 of 10 are not whole tiles of 32 rows"):
        activation_cast(torch.ones(2, 2), None, "silu", "e4m3fn", into=(torch.empty(10, 2), None, 8))
    with pytest.raises(KernelError, match=r"qT of 2 rows must have strides \(16, 1\)"):
        activation_cast(torch.ones(2, 2), None, "silu", "e4m3fn", into=(None, torch.empty(2, 2), 0))
    with pytest.raises(KernelError, match="contiguous matrices"):
        activation_keep(torch.ones(2, 4)[:, ::2], None, "silu", (codes, None))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", sorted(FORWARD))
def test_all_bfloat16_inputs(activation: str) -> None:
    """relu byte for byte; the others, of finite values, to the step that the last bit of an exponential moves."""
    x = every_16_bits(torch.bfloat16)
    scale = torch.tensor(0.05)
    if activation == "relu":
        expected = quantize_scaled(torch.where(x < 0, 0.0, x), formats.get("e4m3fn"), scale)
        q, t = activation_cast(x.cuda(), None, activation, "e4m3fn", scale.cuda())
        same_bytes(q, expected)
        same_transposed(t, expected)
        return
    x = x.nan_to_num(0.0, 1.0, -1.0)
    y = FORWARD[activation](x)
    q, t = activation_cast(x.cuda(), None, activation, "e4m3fn", scale.cuda())
    nearly_the_codes(q, y, "e4m3fn", scale)
    nearly_transposed(t, y, "e4m3fn", scale)
