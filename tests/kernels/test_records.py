"""What casts tell of a tensor on the way: amax and counts of zeros, sums over the rows, and scales made from partial amaxes."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import nearly_the_codes, nearly_transposed, same_bytes, same_floats, same_transposed, sampled_counts, specials
from torch import Tensor
from torch.nn import functional as F

from fp8fx import formats, numerics
from fp8fx.errors import KernelError
from fp8fx.numerics.tensor import quantize_scaled
from fp8fx.spec import TensorSpec

pytest.importorskip("triton")
from fp8fx.kernels import norm_statistics
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.amax import amax_parts
from fp8fx.kernels.cast import cast, cast_current
from fp8fx.kernels.norm_cast import norm_cast
from fp8fx.kernels.results import Scaling


def test_counts_of_zeros(device: str) -> None:
    """Half of the values are too small for their format, an eighth are zeros; tall tensors are sampled, flat ones by tiles of 4 x 4096."""
    for (m, k), block_m in (((70, 150), 64), ((1030, 36), 64)):
        x = torch.randn(m, k)
        x[::2] *= 1e-9
        x[:, ::8] = 0.0
        x[0, 0] = float("nan")
        for layout in ("both", "rows", "transposed"):
            record = torch.zeros(3, device=device)
            q, t = cast(x.to(device), "e4m3fn", torch.tensor(0.01, device=device), layout=layout, record=record, counts=True)
            codes = quantize_scaled(x, formats.get("e4m3fn"), torch.tensor(0.01))
            same_bytes(q if t is None else t.mT.contiguous(), codes)
            flat = layout == "rows" and m * k % 64 == 0
            expected = sampled_counts(x.view(-1, 64) if flat else x, codes.view(-1, 64) if flat else codes, block_m)
            assert record.tolist() == [float(numerics.amax(x)), *expected]
    wide = torch.randn(8, 8192) * (torch.rand(8, 8192) < 0.5)
    record = torch.tensor([100.0, 5.0, 6.0], device=device)  # raised and added to
    q, _ = cast(wide.to(device), "e5m2", None, record=record, counts=True)
    assert q is not None
    n, z = sampled_counts(wide.view(16, 4096), q.view(16, 4096), 4)
    assert record.tolist() == [100.0, 5.0 + n, 6.0 + z]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_current_scaling_records_what_it_measures(device: str, granularity: str) -> None:
    x = specials(torch.randn(130, 70)).to(torch.bfloat16)
    record, sums = torch.zeros(3, device=device), torch.empty(70, device=device)
    made = cast_current(x.to(device), "e4m3fn", granularity, layout="both", record=record, counts=True, bias_grad=sums)
    q, scale, _ = numerics.quantize_tensor(x, TensorSpec(format="e4m3fn", granularity=granularity))
    same_bytes(made.q, q)
    same_floats(made.scale, scale)
    assert record.tolist() == [float(numerics.amax(x)), *sampled_counts(x, q, 64)]
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    cast(clean.to(device), "e4m3fn", None, bias_grad=sums)
    torch.testing.assert_close(sums.cpu(), clean.float().sum(0), rtol=1e-5, atol=0.1)  # of values up to 6e4


def test_a_scale_made_from_partial_amaxes(device: str) -> None:
    for shape in ((1,), (70, 150), (3, 37, 20), (6, 4096)):
        x = specials(torch.randn(shape)).to(torch.bfloat16)
        parts = amax_parts(x.to(device))
        same_floats(parts.max(), numerics.amax(x))
        for power_of_two in (False, True):
            spec = TensorSpec(format="e5m2", granularity="tensor", power_of_two=power_of_two)
            expected, scale, largest = numerics.quantize_tensor(x, spec)
            made, record = torch.empty(2, device=device), torch.zeros(1, device=device)
            how = {"from_amax": True, "made_scale": made, "power_of_two": power_of_two, "record": record}
            q, _ = cast(x.to(device), "e5m2", parts, **how)
            same_bytes(q, expected)
            same_floats(made, torch.stack([scale, largest]))
            same_floats(record, largest[None])
    strided = torch.randn(64, 50).t().to(device)
    same_floats(amax_parts(strided).max(), numerics.amax(strided.cpu()))
    made = torch.empty((), device=device)
    cast(strided[:0], "e4m3fn", amax_parts(strided[:0]), from_amax=True, made_scale=made)
    same_floats(made, numerics.compute_scale(torch.zeros(()), "e4m3fn"))


@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu_tanh", False)])
def test_activations_under_current_scaling(device: str, activation: str, gated: bool) -> None:
    """The amax that the first pass finds is that of what the second casts: its largest code is that of max, or next to it."""
    h, u, dy = (torch.randn(70, 150, device=device) * 2 for _ in range(3))
    other = u if gated else None
    y = (F.silu(h) if activation == "silu" else F.gelu(h, approximate="tanh")) * (u if gated else 1.0)
    merged = torch.zeros((), device=device)
    amax = activation_amax(h, other, activation)
    assert activation_amax(h, other, activation, merged) is merged
    torch.testing.assert_close(amax.max(), merged, rtol=1e-6, atol=0)
    merged = amax.max()
    made, record = torch.empty((), device=device), torch.zeros(3, device=device)
    q, t = activation_cast(h, other, activation, "e4m3fn", amax, record=record, counts=True, from_amax=True, made_scale=made)
    torch.testing.assert_close(merged, numerics.amax(y), rtol=1e-5, atol=0)
    same_floats(made, numerics.compute_scale(merged.cpu(), "e4m3fn"))
    nearly_the_codes(q, y, "e4m3fn", made)
    nearly_transposed(t, y, "e4m3fn", made)
    assert q is not None
    n, z = sampled_counts(y, q, 32)
    # torch's tail of gelu reaches further before it is zero than ours; either's codes are zero there.
    assert record[0] == merged
    assert abs(float(record[1] - record[2]) - (n - z)) <= 2
    assert abs(float(record[1]) - n) <= 0.01 * n

    leaves = [h.clone().requires_grad_(), u.clone().requires_grad_()]
    y = (F.silu(leaves[0]) if activation == "silu" else F.gelu(leaves[0], approximate="tanh")) * (leaves[1] if gated else 1.0)
    grads = torch.autograd.grad(y, leaves if gated else leaves[:1], dy)
    amaxes = activation_backward_amax(dy, h, other, activation)
    scales, sums = torch.empty(2, device=device).unbind(), torch.empty(2, 150, device=device).unbind()
    pairs = activation_backward_cast(
        dy,
        h,
        other,
        activation,
        "e5m2",
        *amaxes,
        from_amax=True,
        made_scale=scales[0],
        made_scale_u=scales[1],
        power_of_two=True,
        bias_grad=sums[0],
        bias_grad_u=sums[1] if gated else None,
    )
    for (q, t), grad, scale, total, measured in zip(pairs, grads, scales, sums, amaxes, strict=False):
        assert measured is not None
        same_floats(scale, numerics.compute_scale(measured.max().cpu(), "e5m2", power_of_two=True))
        nearly_the_codes(q, grad, "e5m2", scale)
        nearly_transposed(t, grad, "e5m2", scale)
        torch.testing.assert_close(total, grad.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_under_current_scaling(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, shape in ((8192, (70, 150)), (64, (2, 150))):  # rows in one block, and in chunks
        monkeypatch.setattr(norm_statistics, "_MOST", most)
        x, weight, bias = (
            torch.randn(shape, device=device) + 1,
            torch.randn(shape[-1], device=device),
            torch.randn(shape[-1], device=device),
        )
        made, record = torch.empty(2, device=device), torch.zeros(3, device=device)
        how = {"current": True, "made_scale": made, "record": record, "counts": True}
        (q, t), _, _ = norm_cast(x, weight, bias if kind == "layer" else None, "e4m3fn", kind, 1e-5, **how)
        y = F.layer_norm(x, shape[-1:], weight, bias, 1e-5) if kind == "layer" else F.rms_norm(x, shape[-1:], weight, 1e-5)
        torch.testing.assert_close(made[1], numerics.amax(y), rtol=1e-5, atol=0)
        same_floats(made[0], numerics.compute_scale(made[1].cpu(), "e4m3fn"))
        nearly_the_codes(q, y, "e4m3fn", made[0])
        nearly_transposed(t, y, "e4m3fn", made[0])
        assert q is not None
        assert record.tolist() == [float(made[1]), *sampled_counts(y, q, 32)]
    norm_cast(x[:0], None, None, "e4m3fn", current=True, made_scale=made)
    same_floats(made, torch.stack([numerics.compute_scale(torch.zeros(()), "e4m3fn"), torch.zeros(())]))


@pytest.mark.parametrize("shape", [(1, 1), (70, 150), (2, 40, 36)], ids=str)
def test_bias_gradients(device: str, shape: tuple[int, ...]) -> None:
    for dtype, layout in ((torch.float32, "rows"), (torch.bfloat16, "both")):
        x = torch.randn(shape).to(dtype)
        expected = x.reshape(-1, shape[-1]).double().sum(0)
        sums: list[Tensor] = []
        for _ in range(2):
            out = torch.empty(shape[-1], device=device)
            cast(x.to(device), "e5m2", None, layout=layout, bias_grad=out)
            sums.append(out)
        assert torch.equal(*sums), "the order of the sum is fixed"
        torch.testing.assert_close(sums[0].cpu().double(), expected, rtol=0, atol=1e-5 * shape[-2])
    out = torch.ones(shape[-1], device=device)
    cast(x[..., :0, :].to(device), "e5m2", None, bias_grad=out)
    assert float(out.abs().max()) == 0.0


def test_refusals() -> None:
    x, one = torch.ones(4, 4), torch.ones(())
    with pytest.raises(KernelError, match="pass record"):
        cast(x, "e4m3fn", one, amax=one, counts=True)
    with pytest.raises(KernelError, match="not both"):
        cast(x, "e4m3fn", one, amax=one, record=torch.zeros(3))
    with pytest.raises(KernelError, match=r"float32 \[3\]"):
        cast(x, "e4m3fn", one, record=torch.zeros(2), counts=True)
    with pytest.raises(KernelError, match="made_scale"):
        cast(x, "e4m3fn", one, from_amax=True)
    with pytest.raises(KernelError, match="power of two"):
        Scaling(torch.ones(3), True, one).check("cast")
    with pytest.raises(KernelError, match=r"contiguous float \[4\]"):
        cast(x, "e4m3fn", one, bias_grad=torch.ones(5))
    with pytest.raises(KernelError, match="together"):
        activation_backward_amax(x, x, x, "silu", one, None)
    with pytest.raises(KernelError, match="not both"):
        norm_cast(x, None, None, "e4m3fn", scale=one, current=True, made_scale=one)


@pytest.mark.gpu
def test_two_streams_and_a_captured_graph() -> None:
    """Partial amaxes, partial sums and scales made on the way belong to a call, not to a device."""
    xs = [torch.randn(512, 768, device="cuda", dtype=torch.bfloat16) * 2.0**i for i in range(8)]
    expected = [numerics.quantize_tensor(x.cpu(), TensorSpec(format="e4m3fn")) for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    sums = torch.empty(8, 768, device="cuda")
    torch.cuda.synchronize()
    results = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 2]):
            results.append(cast_current(x, "e4m3fn", layout="both", bias_grad=sums[i]))
    torch.cuda.synchronize()
    for i, (made, (q, scale, largest)) in enumerate(zip(results, expected, strict=True)):
        same_bytes(made.q, q)
        same_transposed(made.q_t, q)
        same_floats(made.scale, scale)
        same_floats(made.amax, largest)
        torch.testing.assert_close(sums[i], xs[i].float().sum(0), rtol=1e-4, atol=1e-3 * 2.0**i)
    graph, scale, record = torch.cuda.CUDAGraph(), torch.empty(2, device="cuda"), torch.zeros(3, device="cuda")

    def step() -> tuple[Tensor | None, Tensor | None]:
        record.zero_()
        amax = activation_amax(xs[0], xs[1], "silu")
        return activation_cast(xs[0], xs[1], "silu", "e4m3fn", amax, record=record, counts=True, from_amax=True, made_scale=scale)

    step()
    with torch.cuda.graph(graph):
        captured, _ = step()
    xs[0].mul_(2.0)
    graph.replay()
    assert captured is not None
    replayed, seen = captured.view(torch.uint8).clone(), torch.cat([scale, record])
    plain, _ = step()
    assert plain is not None
    assert torch.equal(plain.view(torch.uint8), replayed)
    assert torch.equal(torch.cat([scale, record]), seen)
