"""Training steps through the operators' CUDA implementations, in Triton's interpreter: what test_interpreted.py runs on its own.

    python tests/ops/interpreted.py hybrid delayed ...        for each, the lowest SQNR of output and gradients in dB, and the operators

The graph is the one a GPU gets; each operator runs what it runs there, on CPU tensors, products on the project's own kernel. What it is
compared with is the reference: the graph that a CPU gets. Tapes are not part of it, as they hold compiled kernels.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

import numpy
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.kernels import replay
from fp8fx.ops.library import LIBRARY, REFERENCES
from fp8fx.passes.contract import Context

STEPS = {"on": False}
RAN: set[str] = set()  # the operators whose CUDA implementations have run


class Gated(nn.Module):
    """A SwiGLU block behind a norm, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-5)
        self.gate, self.up, self.down = nn.Linear(32, 80, bias=False), nn.Linear(32, 80, bias=False), nn.Linear(80, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def plain() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 48))


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "gated": Gated}


def round_bfloat16(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter cuts float32 to bfloat16; a GPU rounds it."""

    def run(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        x = torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.float32))
        return x.bfloat16().view(torch.int16).numpy().view(numpy.uint16)

    return run


def prepare() -> None:
    """From here on the operators run their CUDA implementations on CPU tensors where STEPS says so, and graphs are made for an H100."""
    interpreter._convert_float = round_bfloat16(interpreter._convert_float)
    replay.taped = lambda function: function
    from fp8fx.ops import cuda, cuda_act

    cuda.torch_has = lambda *_: False  # type: ignore[assignment]
    for name, function in {**cuda.IMPLEMENTATIONS, **cuda_act.IMPLEMENTATIONS}.items():
        reference = REFERENCES[name]

        def run(*args: Any, name: str = name, function: Any = function, reference: Any = reference, **kwargs: Any) -> Any:
            if not STEPS["on"]:
                return reference(*args, **kwargs)
            RAN.add(name)
            return function(*args, **kwargs)

        LIBRARY.impl(name, run, "CPU")
    plain_on = Context.on

    def on(self: Context, device: torch.device, trains: bool) -> Context:
        if not STEPS["on"]:
            return plain_on(self, device, trains)
        return dataclasses.replace(self, device="cuda", weights_inside=trains, device_name="NVIDIA H100 80GB HBM3", capability=(9, 0))

    Context.on = on  # type: ignore[method-assign]


def step(model: nn.Module, recipe: Any, x: Tensor, kernels: bool) -> list[Tensor]:
    """Output and gradients of the second step, whose scales follow from the first."""
    STEPS["on"] = kernels
    fast = fp8fx.compile(model, recipe, inner="eager", dynamic=False)
    for _ in range(2):
        x.grad = None
        model.zero_grad()
        y = fast(x)
        (y.float().square().sum() * 64).backward()
        fp8fx.step(fast)
    assert x.grad is not None
    return [y.detach().float(), x.grad.float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]


def compare(name: str, recipe: str, changes: dict[str, Any], rows: int) -> float:
    """The lowest SQNR in dB."""
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    x = (torch.randn(rows, 32) * 3).bfloat16().requires_grad_()
    defaults = {"when_not_faster": "emulate", **changes}
    made = {"extends": recipe, "defaults": defaults, "scale": {"power_of_two": True}}
    ours, theirs = step(model, made, x, True), step(model, made, x, False)
    found = [20 * torch.log10(b.norm() / (a - b).norm().clamp(min=1e-9)) for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(found).min())  # NaN where there is one


def main() -> None:
    warnings.simplefilter("ignore")
    prepare()
    more = ({"save_activation_inputs": "fp8"}, {"weight_transpose": "keep"})
    for recipe in sys.argv[1:]:
        for name in MODELS:
            for changes in ({}, *more) if recipe == "hybrid" else ({},):
                RAN.clear()
                lowest = compare(name, recipe, changes, 33)
                print(recipe, name, f"{lowest:.1f}", ",".join(sorted(RAN)), *changes.values(), flush=True)


if __name__ == "__main__":
    main()
