"""The CUDA implementations of the activation operators against their references: codes but for the last bit of an exponential, scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fp8fx.ops import cuda_act, cuda_act_linear
from fp8fx.ops.casts import RECORD
from fp8fx.ops.library import REFERENCES

CURRENT, DELAYED = ("e4m3fn/current/tensor/nearest_even/saturate", "e4m3fn/delayed/tensor/nearest_even/saturate/power_of_two")


def arguments(device: str, spec: str, gated: bool, kept: bool, activation: str = "relu") -> tuple[Any, ...]:
    """Of act_linear: x [2, 41, 32], weights [144, 32]. relu has no exponential, so that codes are equal bit for bit."""
    x, w1, w2 = torch.randn(2, 41, 32, device=device), torch.randn(144, 32, device=device), torch.randn(144, 32, device=device)
    back = f"grad_output={spec.replace('e4m3fn', 'e5m2')};gemms=output,grad_input,grad_weight;columns=yes"
    back += ";save_activation_inputs=fp8" if kept else ""
    codes = [list(REFERENCES["cast_current"](t, CURRENT, None, "", "", None, "rows")[:3:2]) for t in (x, w1, w2)]
    record = torch.zeros(RECORD, device=device)
    scale = torch.tensor(0.25, device=device) if spec == DELAYED else None
    return (
        x, w1, w2 if gated else None, None, None, codes[0], codes[1], codes[2] if gated else [], None, None, None, None, scale, record,
        None, activation, "gate", "up", CURRENT, CURRENT, CURRENT, back, back, spec, "down", "both", torch.float32,
    )  # fmt: skip


def nearly(ours: Any, theirs: Any) -> None:
    """Products are sums in another order: codes differ where a value lies next to a boundary. A stray row or layout would show."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            assert a.stride() == b.stride()
            first, second = (x.view(torch.float8_e4m3fn).float() if x.dtype == torch.uint8 else x.float() for x in (a, b))
            assert float((first - second).norm()) <= 1e-2 * float(second.norm())


@pytest.mark.parametrize("spec", [CURRENT, DELAYED], ids=["current", "delayed"])
@pytest.mark.parametrize(("gated", "kept"), [(True, False), (True, True), (False, True)])
def test_act_linear(device: str, spec: str, gated: bool, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_act_linear, "ROWS", 32)  # 82 rows take three parts
    args = arguments(device, spec, gated, kept)
    ours, theirs = cuda_act.act_linear(*args), REFERENCES["act_linear"](*args[:13], args[13].clone(), *args[14:])
    nearly(ours, theirs)
    other = args[13].clone()
    args[13].zero_()
    REFERENCES["act_linear"](*args)
    # Hopper's FP8 instructions cut each of the 33 terms of these products below 2^-13 of the largest (fp8fx/arithmetic/tiles.py); two of
    # them are multiplied where gated. What cuts nothing adds float32 in another order.
    rtol = 1e-5 if device == "cpu" else (1 + gated) * 33 * 2.0**-13
    torch.testing.assert_close(other, args[13], rtol=rtol, atol=0)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("spec", [CURRENT, DELAYED], ids=["current", "delayed"])
def test_du_after_dh(device: str, spec: str, kept: bool) -> None:
    """Two steps leave the codes, scales, sums and records of one."""
    grad, h, u = (torch.randn(41, 144, device=device) for _ in range(3))
    (q_h, block_h), (q_u, block_u) = ((x, None) for x in (h, u)) if not kept else (REFERENCES["act"](x, None, "relu")[1:3] for x in (h, u))
    scales: list[Tensor | None] = [torch.tensor(s, device=device) if spec == DELAYED else None for s in (0.25, 0.125)]
    found = []
    spec = spec.replace("e4m3fn", "e5m2")
    for implementations in (vars(cuda_act), {f"{name}": REFERENCES[name] for name in REFERENCES}):
        records = torch.zeros(2, 2, RECORD, device=device).unbind()
        inputs = (grad, q_h, q_u, block_h, block_u, "relu", None)
        once = implementations["act_backward_cast"](*inputs, "gate", "up", spec, *scales, *records[0], "both", True)
        q, qt, scale, total, amax = implementations["act_backward_gate"](*inputs, "gate", spec, scales[0], records[1][0], "both", True)
        rest = ("up", spec, scales[1], amax if scales[1] is None else None, records[1][1], "both", True)
        *second, total_u = implementations["act_backward_up"](grad, q_h, block_h, "relu", None, *rest)
        nearly((q, qt, scale, *second, total, total_u), once)
        torch.testing.assert_close(records[0], records[1], rtol=0, atol=0)
        found.append([*once, records[0]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_act(device: str, gated: bool) -> None:
    for columns in (256, 150):
        h, u, grad = (torch.randn(2, 20, columns, device=device) for _ in range(3))
        args = (h, u if gated else None, "silu")
        ours, theirs = cuda_act.act(*args), REFERENCES["act"](*args)
        nearly(ours, theirs)
        pairs = (*theirs[1:3], *(theirs[3:] if gated else (None, None)))
        nearly(cuda_act.act_backward(grad, *pairs, "silu"), REFERENCES["act_backward"](grad, *pairs, "silu"))
