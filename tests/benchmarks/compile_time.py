"""How long fp8fx takes to compile a Llama of 32 layers, against torch.compile of the same model with the same inner compiler.

    python tests/benchmarks/compile_time.py [--layers 32] [--inner eager aot_eager inductor] [--repeat 3] [--json figures.json]

The model is transformers' LlamaForCausalLM, narrow (width 64), since compile time depends on the number of operations and not on
their size. A compile is all that the first training step costs over a later one: `torch.compile` or `fp8fx.compile`, then one
forward and backward, minus the fastest of three further steps. Inductor and AOTAutograd compile the backward at that first call
too; their caches are off. Times are CPU seconds of the process and its children (the C++ compiler), all on one thread, and the least
of `--repeat` runs that alternate between the two, so that other work on the machine counts little.

    baseline    torch.compile(model, backend=inner)
    fp8fx       fp8fx.compile(model, "hybrid", inner=inner), of which
    passes      its front end (copying the graph, names, sites) and its pipeline: what fp8fx itself adds to Dynamo and the inner compiler

Three bars, each PASS or FAIL, and the exit status says whether all passed:

    passes / baseline        at most 25%, for every inner compiler
    fp8fx / baseline         at most 1.6, for every inner compiler
    passes per layer         the largest is within 1.5 times the smallest, over 8, 16, 32 and 64 layers (eager)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a compile that is read from a file is none
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the C++ compiler as a child of this process, whose time is counted

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from benchmark_report import writable  # noqa: E402
from conftest import _import_torchvision  # noqa: E402
from torch import nn  # noqa: E402

_import_torchvision()

import fp8fx  # noqa: E402
from fp8fx import pipeline  # noqa: E402
from fp8fx.capture import dynamo  # noqa: E402

SHARE, TOTAL, FLAT = 0.25, 1.6, 1.5  # the bars
SIZES = (8, 16, 32, 64)
VOCABULARY = 256


@dataclass(frozen=True)
class Figures:
    """CPU seconds to compile one model: `passes` is the part of `fp8fx` that fp8fx's own front end and pipeline take."""

    layers: int
    inner: str
    baseline: float
    fp8fx: float
    front_end: float
    pipeline: float

    @property
    def passes(self) -> float:
        return self.front_end + self.pipeline

    @property
    def share(self) -> float:
        return self.passes / self.baseline

    @property
    def ratio(self) -> float:
        return self.fp8fx / self.baseline


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).train()
    return model


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compile_seconds(model: nn.Module, make: Callable[[nn.Module], Any]) -> float:
    """CPU seconds of the first step (with `make`) over a later one."""
    tokens = torch.randint(3, VOCABULARY, (1, 16))
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # what earlier runs left is not this one's to scan

    def step(compiled: Any) -> None:
        compiled(input_ids=tokens, labels=tokens).loss.backward()

    start = cpu_seconds()
    compiled = make(model)
    step(compiled)
    first = cpu_seconds() - start
    later = []
    for _ in range(3):
        start = cpu_seconds()
        step(compiled)
        later.append(cpu_seconds() - start)
    gc.unfreeze()
    return first - min(later)


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent in `owner.name`, a function, to `spent[name]`."""
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    with mock.patch.object(owner, name, run):
        yield


def fp8_seconds(model: nn.Module, inner: str, recipe: str) -> tuple[float, float, float]:
    """In all, of the front end, and of the pipeline."""
    parts: dict[str, float] = {}
    with timed(dynamo, "from_dynamo", parts), timed(pipeline, "run", parts):
        whole = compile_seconds(model, lambda m: fp8fx.compile(m, recipe, inner=inner))
    return whole, parts["from_dynamo"], parts["run"]


def measure(layers: int, inner: str, recipe: str, repeat: int) -> Figures:
    model = llama(layers)
    baseline, ours = [], []
    for _ in range(repeat):
        baseline.append(compile_seconds(model, lambda m: torch.compile(m, backend=inner)))
        ours.append(fp8_seconds(model, inner, recipe))
    return Figures(layers, inner, min(baseline), *map(min, zip(*ours, strict=True)))


def measure_passes(layers: int, recipe: str, repeat: int) -> float:
    """Seconds of front end and pipeline; the inner compiler has no part in them."""
    model = llama(layers)
    runs = [fp8_seconds(model, "eager", recipe) for _ in range(repeat)]
    return min(front for _, front, _ in runs) + min(passes for *_, passes in runs)


def table(inners: Sequence[str], layers: int, recipe: str, repeat: int) -> list[Figures]:
    """Measure and print one row per inner compiler."""
    print("| inner compiler | layers | baseline | fp8fx | fp8fx / baseline | front end | pipeline | passes / baseline |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    rows = []
    for inner in inners:
        measure(2, inner, recipe, 1)  # imports and first-use caches are nobody's compile time
        rows.append(row := measure(layers, inner, recipe, repeat))
        print(
            f"| {inner} | {layers} | {row.baseline:.2f} s | {row.fp8fx:.2f} s | {row.ratio:.2f} "
            f"| {row.front_end:.2f} s | {row.pipeline:.2f} s | {row.share:.1%} |",
            flush=True,
        )
    return rows


def growth(sizes: Sequence[int], recipe: str, repeat: int) -> dict[int, float]:
    """Measure and print the passes for each number of layers."""
    print("\n| layers | passes | per layer |\n|---:|---:|---:|", flush=True)
    found = {}
    for layers in sizes:
        found[layers] = seconds = measure_passes(layers, recipe, repeat)
        print(f"| {layers} | {seconds:.2f} s | {seconds / layers * 1e3:.1f} ms |", flush=True)
    return found


def judge(rows: list[Figures], sizes: dict[int, float]) -> list[dict[str, Any]]:
    """Print the bars, and return them as data."""
    per_layer = [seconds / layers for layers, seconds in sizes.items()]
    values = [
        ("passes over baseline, largest", max(row.share for row in rows), SHARE),
        ("fp8fx over baseline, largest", max(row.ratio for row in rows), TOTAL),
        ("passes per layer, largest over smallest", max(per_layer) / min(per_layer), FLAT),
    ]
    print()
    for name, value, allowed in values:
        print(f"{'PASS' if value <= allowed else 'FAIL'}  {name}: {value:.3f} (allowed {allowed})")
    return [{"bar": name, "value": value, "allowed": allowed, "pass": value <= allowed} for name, value, allowed in values]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time to compile a Llama of 32 layers, against torch.compile of the same model.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="for the passes per layer")
    parser.add_argument("--inner", nargs="+", default=["eager", "aot_eager", "inductor"])
    parser.add_argument("--recipe", default="hybrid")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=writable, help="write the figures here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"LlamaForCausalLM, forward and backward, recipe {options.recipe}, torch {torch.__version__}, {platform.machine()}\n")
    rows = table(options.inner, options.layers, options.recipe, options.repeat)
    sizes = growth(options.sizes, options.recipe, options.repeat)
    bars = judge(rows, sizes)
    if options.json:
        figures = [{**asdict(row), "passes": row.passes, "share": row.share, "ratio": row.ratio} for row in rows]
        data = {"torch": torch.__version__, "recipe": options.recipe, "rows": figures, "passes_by_layers": sizes, "bars": bars}
        options.json.write_text(json.dumps(data, indent=1))
    return 0 if all(bar["pass"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
