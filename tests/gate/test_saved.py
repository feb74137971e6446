"""What autograd keeps of the graph that a GPU gets: codes, and what an activation itself needs. Run by the references, on the CPU."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.passes.contract import Context

ROWS, WIDTH, HIDDEN = 64, 32, 80


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(self: Context, device: torch.device, trains: bool) -> Context:
        there: dict[str, Any] = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "capability": (9, 0)}
        return dataclasses.replace(self, weights_inside=trains, **there)

    monkeypatch.setattr(Context, "on", on)


def saved(inner: str, **options: str) -> Counter[tuple[torch.dtype, tuple[int, ...]]]:
    """Of tensors with some elements, the model's own and its input left out."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, found = Gated().bfloat16(), list[Tensor]()
    fast = fp8fx.compile(model, {"extends": "hybrid", "defaults": {"when_not_faster": "emulate", **options}}, inner=inner, dynamic=False)
    x = torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    fast(x).sum().backward()

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    own = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fast(x)
    y.sum().backward()
    kept = {t.data_ptr(): t for t in found if t.data_ptr() not in own and t.numel() >= 1000}
    return Counter((t.dtype, tuple(sorted(t.shape))) for t in kept.values())


E4, HIGH = torch.float8_e4m3fn, torch.bfloat16
NORM, INPUT, ACTIVATION = (WIDTH, ROWS), (WIDTH, ROWS), (ROWS, HIDDEN)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_only_codes_are_kept(inner: str) -> None:
    kept = saved(inner)
    codes = {shape: count for (dtype, shape), count in kept.items() if dtype == E4}
    assert codes == {INPUT: 1, ACTIVATION: 1}, "of the input that gate and up share, and of down's; of no weight"
    high = {shape: count for (dtype, shape), count in kept.items() if dtype != E4}
    assert set(high) <= {NORM, ACTIVATION}
    assert high[ACTIVATION] == 2, "h and u, which SwiGLU itself needs"
    assert high.get(NORM, 0) <= 1, "what the norm keeps of its own"


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_nothing_but_codes_with_activation_inputs_in_fp8(inner: str) -> None:
    kept = saved(inner, save_activation_inputs="fp8")
    assert not any(dtype == HIGH and shape == ACTIVATION for dtype, shape in kept)
    assert sum(count for (dtype, shape), count in kept.items() if shape == ACTIVATION and dtype.itemsize == 1) == 3


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_transposes_of_weights_are_kept_on_request() -> None:
    plain, kept = saved("eager"), saved("eager", weight_transpose="keep")
    assert (kept - plain) == Counter({(E4, (WIDTH, HIDDEN)): 3})
    assert not plain - kept
