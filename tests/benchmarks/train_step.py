"""Time and memory of a training step of two Llama-3-8B blocks in FP8, over torch.compile in bf16.

    python tests/benchmarks/train_step.py --json out.json           needs a CUDA GPU
    python tests/benchmarks/train_step.py --tiny                    the same program on small sizes, on any device: is it right?

A step is forward and backward, with the first operation of the next step (scales, for delayed scaling); no optimizer. Every candidate is
checked against bf16 before it is timed: the SQNR of output and gradients. One model at a time is alive. Ratios hold within a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.clone import runtime_of

BARS = {  # (tokens, recipe) -> least speed-up
    ("4x2048", "delayed"): 1.58, ("4x2048", "hybrid"): 1.50, ("8x2048", "delayed"): 1.88, ("8x2048", "hybrid"): 1.75,
    ("1x2048", "delayed"): 1.42, ("1x2048", "hybrid"): 1.34,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    layers: int = 2
    length: int = 2048


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, head = size, size.width // size.heads
        self.norm1, self.norm2 = (nn.RMSNorm(size.width, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(size.width, size.kv_heads * head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self._heads(p(h)) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size.width // self.size.heads)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Blocks(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        head = size.width // size.heads
        angles = torch.outer(torch.arange(size.length), 5e5 ** (-torch.arange(0, head, 2) / head)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cos.to(x.dtype), self.sin.to(x.dtype))  # type: ignore[operator]
        return x


def make(size: Size, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return Blocks(size).to(torch.bfloat16).train()


def candidate(name: str, model: nn.Module, inner: str, inner_mode: str | None) -> Callable[[Tensor], Tensor]:
    if name == "bf16":
        return torch.compile(model, fullgraph=True)
    if name == "bf16 eager":
        return model
    if name.endswith("eager"):
        return fp8fx.compile(model, name.removesuffix(" eager"), fullgraph=True, inner="eager")
    return fp8fx.compile(model, name, fullgraph=True, inner=inner, inner_mode=inner_mode)


class Step:
    """Forward and backward of one candidate."""

    def __init__(self, name: str, batch: int, size: Size, device: str, inner: str, inner_mode: str | None) -> None:
        self.model = make(size, device)
        self.run = candidate(name, self.model, inner, inner_mode)
        generator = torch.Generator(device).manual_seed(1)
        shape = (batch, size.length, size.width)
        self.x = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
        self.dy = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) / size.width
        self.runtime: Any = runtime_of(self.run) if isinstance(self.run, nn.Module) else None

    def __call__(self) -> Tensor:
        for tensor in (self.x, *self.model.parameters()):
            tensor.grad = None
        y = self.run(self.x)
        y.backward(self.dy)
        if self.runtime is not None:
            self.runtime.optimizer_stepped()
        return y

    def tensors(self) -> dict[str, Tensor]:
        for _ in range(3):  # delayed scales follow
            y = self()
        weights = {name: p.grad.float().cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        return {"output": y.detach().float().cpu(), "input gradient": self.x.grad.float().cpu(), **weights}  # type: ignore[union-attr]


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (wanted - found).norm()))


def seconds(step: Step, device: str, rounds: int) -> float:
    sync: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        step()
    found = []
    for _ in range(rounds):
        sync()
        start = time.perf_counter()
        for _ in range(4):
            step()
        sync()
        found.append((time.perf_counter() - start) / 4)
    return statistics.median(found)


def measure(
    name: str, batch: int, size: Size, options: Any, reference: dict[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    step = Step(name, batch, size, options.device, options.inner, options.inner_mode)
    values = step.tensors()
    row: dict[str, Any] = {"candidate": name, "tokens": f"{batch}x{size.length}"}
    if reference is not None:
        found = {key: sqnr(reference[key], values[key]) for key in reference}
        gradients = [value for key, value in found.items() if key.endswith("weight")]
        row |= {"output": found["output"], "input gradient": found["input gradient"], "lowest weight gradient": min(gradients)}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak"] = torch.cuda.max_memory_allocated() / 2**30
    row["ms"] = 1e3 * seconds(step, options.device, options.rounds)
    del step
    gc.collect()
    torch._dynamo.reset()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return row, values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 1])
    parser.add_argument("--candidates", nargs="+", default=["bf16", "delayed", "hybrid"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--inner-mode", help="a torch.compile mode for the FP8 candidates: reduce-overhead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no CUDA GPU: only --tiny runs here")
    size = Size(64, 4, 2, 160, 2, 32) if options.tiny else Size()
    rows: list[dict[str, Any]] = []
    failed = False
    for batch in options.batches:
        reference: dict[str, Tensor] | None = None
        for name in options.candidates:
            row, values = measure(name, batch, size, options, reference)
            reference = values if reference is None else reference
            base = next(r for r in rows if r["tokens"] == row["tokens"]) if reference is not values else row
            row |= {"speed-up": base["ms"] / row["ms"], "memory": row.get("peak", 1) / base.get("peak", 1)}
            rows.append(row)
            bar = BARS.get((row["tokens"], name))
            verdict = "" if bar is None else f"{'PASS' if row['speed-up'] >= bar else 'FAIL'} {bar}"
            failed |= verdict.startswith("FAIL")
            quality = "  ".join(f"{k} {row[k]:.1f} dB" for k in ("output", "input gradient", "lowest weight gradient") if k in row)
            times = f"{row['ms']:8.2f} ms  x{row['speed-up']:.3f}  memory {row['memory']:.3f}"
            print(f"{row['tokens']:>8} {name:<16} {times}  {quality}  {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "device": options.device, "rows": rows}, indent=1))
    print("FAIL" if failed else "PASS")
    return int(failed and not options.tiny)


if __name__ == "__main__":
    sys.exit(main())
