"""How long fp8fx's passes take: per layer, from 50 to 1,600 layers, and against TorchDynamo's own capture.

    python tests/benchmarks/passes.py [--layers 50 200 800 1600] [--recipe hybrid] [--json figures.json]

The model is a stack of norm -> linear -> gelu -> linear blocks, all captured as one graph. `capture` is the time from the call of the
model to the call of the backend: Dynamo alone. `front end` is fp8fx.capture (copying, names, sites), `passes` the pipeline with its
copy of the graph, the best of `--repeat` runs. Times are this process's CPU time, so that other work on the machine does not count;
all of it runs on one thread. Two bars, each PASS or FAIL, and the exit status says whether all passed:

    passes per layer        the largest is within 1.5 times the smallest, over all sizes
    passes / capture        under 25% at every size
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmark_report import writable
from torch import Tensor, nn
from torch.nn import functional as F

from fp8fx import pipeline
from fp8fx.capture import dynamo
from fp8fx.capture.layers import module_types
from fp8fx.passes.contract import Context
from fp8fx.recipe import Recipe

FLAT, SHARE = 1.5, 0.25  # the bars


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@dataclass(frozen=True)
class Figures:
    """Seconds for one model of `layers` linear layers."""

    layers: int
    capture: float
    front_end: float
    passes: float
    seconds: dict[str, float]  # per pass

    @property
    def per_layer(self) -> float:
        return self.passes / self.layers

    @property
    def share(self) -> float:
        return self.passes / self.capture


def measure(layers: int, recipe: str, repeat: int) -> Figures:
    model = nn.Sequential(*(Block(8) for _ in range(layers // 2)))
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(time.process_time() - start)
        begun = time.process_time()
        found.append(dynamo.from_dynamo(module, example_inputs, model))
        found.append(time.process_time() - begun)
        return module.forward

    torch._dynamo.reset()
    gc.collect()
    start = time.process_time()
    torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(2, 8))
    capture, captured, front_end = found
    context = Context(Recipe.load(recipe), module_types(model), captured.complete, dynamo.append_placeholder)
    best, seconds = float("inf"), {}
    for _ in range(repeat):
        gc.collect()
        start = time.process_time()
        compiled = pipeline.run(captured, context)
        taken = time.process_time() - start
        if taken < best:
            best, seconds = taken, compiled.seconds
    return Figures(layers, capture, front_end, best, seconds)


def report(rows: list[Figures]) -> list[dict[str, Any]]:
    """Print the table; return the bars as data."""
    names = list(rows[0].seconds)
    print(
        " layers  capture s  front end s  passes s  us/layer  of capture   " + "".join(f"{name:>12}" for name in names) + "   wall us/layer"
    )
    for row in rows:
        each = "".join(f"{row.seconds[name] / row.layers * 1e6:12.0f}" for name in names)
        print(
            f"{row.layers:7}{row.capture:11.3f}{row.front_end:13.3f}{row.passes:10.3f}{row.per_layer * 1e6:10.0f}{row.share:12.1%}   {each}"
        )
    flat = max(row.per_layer for row in rows) / min(row.per_layer for row in rows)
    share = max(row.share for row in rows)
    bars = [
        {"bar": "passes per layer, largest over smallest", "value": flat, "allowed": FLAT, "pass": flat <= FLAT},
        {"bar": "passes over capture, largest", "value": share, "allowed": SHARE, "pass": share < SHARE},
    ]
    for bar in bars:
        print(f"{'PASS' if bar['pass'] else 'FAIL'}  {bar['bar']}: {bar['value']:.3f} (allowed {bar['allowed']})")
    return bars


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time of fp8fx's passes per layer, and against Dynamo's capture.")
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 200, 800, 1600])
    parser.add_argument("--recipe", default="hybrid")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=writable, help="write the figures here")
    options = parser.parse_args(argv)
    measure(16, options.recipe, 1)  # imports and first-use caches of torch are not the passes'
    rows = [measure(layers, options.recipe, options.repeat) for layers in options.layers]
    print(f"recipe {options.recipe}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    bars = report(rows)
    if options.json:
        figures = [{**asdict(row), "per_layer": row.per_layer, "share": row.share} for row in rows]
        options.json.write_text(json.dumps({"torch": torch.__version__, "recipe": options.recipe, "rows": figures, "bars": bars}, indent=1))
    return 0 if all(bar["pass"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
