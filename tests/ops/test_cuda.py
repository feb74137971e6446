"""The operators' CUDA implementations against their references: codes, scales and amax bit for bit, products within a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8fx
from fp8fx.ops.casts import RECORD
from fp8fx.ops.library import REFERENCES

pytestmark = pytest.mark.gpu
ops = torch.ops.fp8fx
SPECS = [
    f"{format}/{scaling}/tensor/{rounding}/{overflow}{power}"
    for format in ("e4m3fn", "e5m2")
    for scaling, power in (("current", ""), ("current", "/power_of_two"), ("delayed", "/power_of_two"), ("none", ""))
    for rounding, overflow in (("nearest_even", "saturate"), ("stochastic", "nonfinite"))
]


@pytest.fixture(autouse=True)
def _alone() -> None:
    """A size that another test has compiled for would make this one's a symbol."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    from fp8fx.ops import cuda

    cuda.register()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def sqnr(wanted: list[Tensor], found: list[Tensor]) -> list[float]:
    """In dB, one by one."""
    return [float(20 * torch.log10(a.norm() / (a - b).norm().clamp(min=1e-9))) for a, b in zip(wanted, found, strict=True)]


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride() or not a.numel()
        bytes_ = torch.uint8 if a.element_size() == 1 else a.dtype
        assert torch.equal(a.cpu().view(bytes_), b.cpu().view(bytes_))


@pytest.mark.parametrize("shape", [(2, 24, 40), (33, 7), (0, 16)])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, rng = values(*shape, dtype=dtype), torch.tensor([3, 1, 4])
    scale = torch.tensor(0.03125) if "delayed" in spec else None
    tail = (rng.cuda(), "fc", "input", None if scale is None else scale.cuda())
    same(ops.quantize(x.cuda(), spec, [-1], *tail), REFERENCES["quantize"](x, spec, [-1], rng, "fc", "input", scale))
    name = "cast_current" if "current" in spec else "cast"
    for layout in ("rows", "transposed", "both"):
        record = torch.zeros(RECORD)
        args = (spec, rng, "fc", "grad_output", *([scale] if name == "cast" else []))
        there = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
        measured = record.cuda()
        same(getattr(ops, name)(x.cuda(), *there, measured, layout), REFERENCES[name](x, *args, record, layout))
        assert float(measured[0]) == float(record[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cast_amax(dtype: torch.dtype) -> None:
    """Where the amax is known: the codes and the scale of cast_current."""
    for spec in [spec for spec in SPECS if "/current/" in spec]:
        for shape in ((2, 24, 40), (33, 7), (0, 16)):
            x, rng, record = values(*shape, dtype=dtype).cuda(), torch.tensor([3, 1, 4]).cuda(), torch.zeros(2, RECORD).cuda()
            amax = x.abs().amax().float() if x.numel() else torch.zeros((), device="cuda")
            for layout in ("rows", "transposed", "both"):
                ours = ops.cast_amax(x, amax, spec, rng, "fc", "grad_output", record[0], layout)
                theirs = ops.cast_current(x, spec, rng, "fc", "grad_output", record[1], layout)
                same(ours, theirs[:3])
            assert torch.equal(record[0], record[1])


@pytest.mark.parametrize("scaling", ["current", "delayed", "none"])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_rounded"])
def test_norms(kind: str, scaling: str) -> None:
    """Called twice, the second time from the tape. Sums are added in another order, so codes at a boundary may differ."""
    spec, scale = f"e4m3fn/{scaling}/tensor/nearest_even/saturate", torch.tensor(0.03) if scaling == "delayed" else None
    for seed in range(2):
        x, r, grad, add = (values(3, 41, 512, seed=4 * seed + i) for i in range(4))
        w, b = values(512, seed=9), values(512, seed=10) if kind == "layer" else None
        for residual, of_sum in ((None, None), (r, add)):
            args = (x, residual, w, b, kind, 1e-5, spec, None, "fc", scale, torch.zeros(RECORD), "both")
            theirs = REFERENCES["norm_cast"](*args)
            there = [a.cuda() if isinstance(a, Tensor) else a for a in args]
            ours = ops.norm_cast(*there)
            s = x if residual is None else theirs[1]
            back = (grad, s, w, b, *theirs[5:], of_sum, kind, 1e-5)
            theirs += REFERENCES["norm_backward"](*back)
            ours += ops.norm_backward(*[a.cuda() if isinstance(a, Tensor) else a for a in back])
            torch.testing.assert_close(there[10].cpu(), args[10], rtol=1e-2, atol=0)
            for a, c in zip(ours, theirs, strict=True):
                assert (a.shape, a.dtype) == (c.shape, c.dtype)
                assert a.stride() == c.stride() or not a.numel()
                if c.numel() and bool(c.float().any()):
                    assert 20 * torch.log10(c.float().norm() / (a.cpu().float() - c.float()).norm().clamp(min=1e-9)) > 35


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_values(spec: str, dtype: torch.dtype) -> None:
    """Called twice: the second time from the tape."""
    rng, scale = torch.tensor([3, 1, 4]), torch.tensor(0.03125) if "delayed" in spec else None
    for shape in ((24, 4096), (33, 7), (0, 16)):
        for seed in range(2):
            x = values(*shape, seed=seed, dtype=dtype)
            there = (rng.cuda(), "fc", "grad_input", None if scale is None else scale.cuda())
            same(ops.round_values(x.cuda(), spec, *there), REFERENCES["round_values"](x, spec, rng, "fc", "grad_input", scale))


@pytest.mark.parametrize("rounding", ["nearest_even/saturate", "stochastic/nonfinite"])
@pytest.mark.parametrize("accumulate", ["fast", "precise"])
def test_rounded_products(rounding: str, accumulate: str) -> None:
    """Sums of small integers are exact in any order, so that every bit is the reference's; e5m2 x e5m2, which torch refuses."""
    spec, rng = f"e5m2/none/tensor/{rounding}", torch.tensor([3, 1, 4])
    for m, n, k in ((512, 1024, 256), (33, 48, 64), (130, 37, 17)):
        a, b = (values(rows, k, seed=i).clamp(-2, 2).round().to(torch.float8_e5m2) for i, rows in enumerate((m, n)))
        tail = ("e5m2", [], None, torch.bfloat16, accumulate, spec)
        ours = ops.rounded_mm(a.cuda(), None, "e5m2", [], b.cuda().t(), None, *tail, rng.cuda(), "fc", "output")
        theirs = REFERENCES["rounded_mm"](a, None, "e5m2", [], b.t(), None, *tail, rng, "fc", "output")
        same([ours], [theirs])


@pytest.mark.parametrize("granularity", ["row", "1x128", "128x128"])
@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
@pytest.mark.parametrize("shape", [(2, 128, 256), (131, 200), (0, 128)])
def test_cast_current_by_rows_and_blocks(granularity: str, layout: str, shape: tuple[int, ...]) -> None:
    if granularity == "128x128" and len(shape) > 2:
        shape = (256, 256)
    spec, x = f"e4m3fn/current/{granularity}/nearest_even/saturate/power_of_two", values(*shape)
    same(ops.cast_current(x.cuda(), spec, None, "", "", None, layout), REFERENCES["cast_current"](x, spec, None, "", "", None, layout))


@pytest.mark.parametrize("spec", [f"{f}/{s}/tensor/nearest_even/saturate" for f in ("e4m3fn", "e5m2") for s in ("current", "delayed")])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_activations(spec: str, activation: str, gated: bool) -> None:
    """Called twice: the second time from the tape. Exponentials differ in their last bit, and so may codes at a boundary."""
    scale = torch.tensor(0.0625) if "delayed" in spec else None
    for seed in range(3):
        grad, h, u = (values(73, 96, seed=3 * seed + i) for i in range(3))
        u = u if gated else values(0)
        tail = (spec, scale, scale, None, None, "both", True)
        there = [t.cuda() if isinstance(t, Tensor) else t for t in tail]
        ours = ops.act_backward_cast(grad.cuda(), h.cuda(), u.cuda(), None, None, activation, None, "gate", "up", *there)
        theirs = REFERENCES["act_backward_cast"](grad, h, u, None, None, activation, None, "gate", "up", *tail)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if b.numel():
                assert a.stride() == b.stride()
                assert 20 * torch.log10(b.float().norm() / (a.cpu().float() - b.float()).norm().clamp(min=1e-9)) > 35


@pytest.mark.parametrize("recipe", ["hybrid", "delayed", "direct", "rowwise", "blockwise"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("rows", [96, 97])
def test_a_training_step_is_that_of_the_cpu(recipe: str, inner: str, rows: int) -> None:
    """Sums are added in another order, and some outputs are rounded to FP8 again: within 30 dB, where FP8 itself leaves 10 to 30.

    Scales are powers of two: otherwise an amax that differs in its last bit moves every code's rounding.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 48)).bfloat16()
    x = values(rows, 64)
    found = []
    for device, how in (("cpu", "eager"), ("cuda", inner)):
        fast = fp8fx.compile(
            model.to(device),
            {"extends": recipe, "defaults": {"rounding": "nearest_even", "when_not_faster": "emulate"}, "scale": {"power_of_two": True}},
            inner=how,
        )
        model.zero_grad()
        y = fast(x.to(device))
        (y.float().square().sum() * 64).backward()
        found.append([y.detach().float().cpu(), *(p.grad.float().cpu() for p in model.parameters() if p.grad is not None)])
    assert all(each > 30 for each in sqnr(*found)), sqnr(*found)


@pytest.mark.parametrize("recipe", ["hybrid", "delayed"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_sizes_that_change(recipe: str, inner: str) -> None:
    """Dynamo makes the second number of rows a symbol: outputs are those of a model that has seen one number of rows only."""
    changes = {"extends": recipe, "defaults": {"rounding": "nearest_even", "when_not_faster": "emulate"}, "scale": {"power_of_two": True}}
    torch.manual_seed(0)
    model = (
        torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 48)).bfloat16().cuda()
    )
    fast = fp8fx.compile(model, changes, inner=inner)
    for rows in (96, 97, 50, 96):
        alone = fp8fx.compile(model, changes, inner=inner, dynamic=False)
        x = values(rows, 64).cuda()
        found = []
        for compiled in (fast, alone):
            model.zero_grad()
            y = compiled(x)
            (y.float().square().sum() * 64).backward()
            found.append([y.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)])
        assert all(each > 30 for each in sqnr(*found)), (rows, sqnr(*found))
