"""Measure the cost model's table: GPU times of a linear layer's products in bf16 and FP8, of the casts, and the host's launch times.

    python tests/benchmarks/measure_costs.py --write              about two minutes; writes fp8fx/costs/<device>.json
    python tests/benchmarks/measure_costs.py --estimate --write   the table as it follows from a few measured rates, where no GPU is
    python tests/benchmarks/measure_costs.py --transfer h200 h100 what has become faster into a table that is older

Products and casts are timed in CUDA graphs. The grid has 6 x 4 x 4 points (M, K, N) from 16 x 256 x 256 to 32768 x 16384 x 16384; at each,
the forward product and the one that contracts the rows, in every column of fp8fx.costs.table.COLUMNS. Host times are those of
chains of 1 and of 9 narrow linear layers compiled as users compile them: what each layer adds, and the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_report import error_text, machine, need_triton, writable
from gpu_timing import Call, captured
from torch import Tensor, nn

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for --tiny; Triton reads it when a kernel is defined

import fp8fx
from fp8fx.costs.table import CASTS, COLUMNS, Table, table_name

ROWS, WIDTHS = (16, 128, 512, 2048, 8192, 32768), (256, 1024, 4096, 16384)
ELEMENTS = tuple(2**power for power in (14, 17, 20, 23, 26, 29))
TINY = ((16,), (128,), (2**13,))
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
FOLDER = Path(__file__).resolve().parents[2] / "fp8fx" / "costs"


def gpu_us(call: Call, rounds: int = 3, least: float = 0.004) -> float:
    """Median GPU time of a call in microseconds; short ones are repeated inside the graph, so that replaying does not count."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays

    graph = captured([call])
    once = min(seconds(graph, 1) for _ in range(2))
    inside = max(1, min(20, math.ceil(2e-4 / once)))
    graph = captured([call] * inside) if inside > 1 else graph
    replays = max(1, math.ceil(least / (once * inside)))
    seconds(graph, replays)
    return 1e6 * statistics.median(seconds(graph, replays) for _ in range(rounds)) / inside


def products(a: Tensor, b: Tensor, columns_of_b: int) -> Iterator[tuple[str, Call]]:
    """Every column's product of bf16 `a` [m, k] and `b` [n, k], contracting k. columns_of_b: that share a block's scale."""
    from fp8fx.kernels.scaled_mm import scaled_mm
    from fp8fx.ops.cuda import scaled  # who has the blocks: cuBLASLt, or the project's kernel

    (m, k), n, device = a.shape, b.shape[0], a.device
    qa, qb = a.to(E4), b.to(E4).t()
    one = torch.ones((), device=device)
    rows, columns = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)

    def theirs(left: Tensor, right: Tensor, fast: bool) -> Call:
        return lambda: torch._scaled_mm(qa, qb, left, right, out_dtype=torch.bfloat16, use_fast_accum=fast)

    yield "bf16", lambda: a @ b.t()
    yield "tensor_fast", theirs(one, one, True)
    yield "tensor_precise", theirs(one, one, False)
    yield "row_fast", theirs(rows, columns, True)
    yield "row_precise", theirs(rows, columns, False)
    a5, b5 = a.to(E5), b.to(E5).t()
    yield "own_precise", lambda: scaled_mm(a5, b5, one, one, accumulate="precise")
    blocks = math.ceil(k / 128)
    scales = torch.ones(m, blocks, device=device), torch.ones(blocks, math.ceil(n / columns_of_b), device=device)
    blocks_b = [128, columns_of_b]
    yield "block", lambda: scaled(qa, scales[0], "e4m3fn", [1, 128], qb, scales[1], "e4m3fn", blocks_b, None, torch.bfloat16)


def gemm_point(m: int, k: int, n: int, device: str) -> list[float]:
    """us per column of the forward product and of the one that contracts m."""
    found: list[float] = []
    for left, right, depth, shared in ((m, n, k, 128), (n, k, m, 1)):
        a, b = (torch.randn(size, depth, device=device, dtype=torch.bfloat16) for size in (left, right))
        times = {name: attempt(name, (left, right, depth), call) for name, call in products(a, b, shared)}
        slowest = max(us for us in times.values() if us is not None)
        found += [round(slowest if times[name] is None else times[name], 3) for name in COLUMNS]  # type: ignore[arg-type]
    return found


def attempt(name: str, size: tuple[int, int, int], call: Call) -> float | None:
    """us, or None for a kernel that does not take this size: it then counts as the slowest of the others."""
    try:
        return gpu_us(call)
    except Exception as error:
        print(f"{name} at {size}: {error_text(error)}", flush=True)
        return None


def cast_calls(x: Tensor) -> dict[str, Call]:
    from fp8fx.kernels.cast import cast, cast_current
    from fp8fx.kernels.cast_block import cast_block

    scale, largest = torch.ones((), device=x.device), torch.zeros((), device=x.device)
    return {
        "rows": lambda: cast(x, "e4m3fn", scale, amax=largest),
        "transposed": lambda: cast(x, "e4m3fn", scale, layout="transposed"),
        "both": lambda: cast(x, "e4m3fn", scale, layout="both", amax=largest),
        "current": lambda: cast_current(x, "e4m3fn"),
        "current_both": lambda: cast_current(x, "e4m3fn", layout="both"),
        "row": lambda: cast_current(x, "e4m3fn", "row"),
        "row_both": lambda: cast_current(x, "e4m3fn", "row", "column", "both"),
        "block": lambda: cast_block(x, "e4m3fn", power_of_two=True),  # as the recipe `blockwise` has them
        "block_both": lambda: cast_block(x, "e4m3fn", layout="both", power_of_two=True),
    }


def casts(elements: Sequence[int], device: str) -> dict[str, list[list[float]]]:
    """kind -> [[elements, us], ...], of matrices about four times as long as wide, with a multiple of 16 rows as batches have."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in CASTS}
    for count in elements:
        width = 128 * max(1, round(math.sqrt(count / 4) / 128))
        x = torch.randn(max(16, count // width // 16 * 16), width, device=device, dtype=torch.bfloat16)
        for kind, call in cast_calls(x).items():
            found[kind].append([x.numel(), round(gpu_us(call), 3)])
    return found


def host(device: str, count: int = 50) -> dict[str, dict[str, float]]:
    """Host us per training step and per inference call: fixed, and per layer in bf16 and in FP8, from chains of 1 and 9 layers."""
    recipe = {"extends": "hybrid", "defaults": {"when_not_faster": "emulate"}}
    inner = "inductor" if device == "cuda" else "eager"
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "bf16": lambda model: torch.compile(model, backend=inner),  # type: ignore[dict-item, return-value]
        "fp8": lambda model: fp8fx.compile(model, recipe, inner=inner),
    }
    found: dict[str, dict[str, float]] = {}
    for mode in ("training", "inference"):
        times = {
            (name, layers): _chain_us(maker, layers, mode == "training", device, count)
            for name, maker in makers.items()
            for layers in (1, 9)
        }
        each = {name: max((times[name, 9] - times[name, 1]) / 8, 0.1) for name in makers}
        found[mode] = {"fixed": max(times["fp8", 1] - each["fp8"], 0.1), **each}
    return {mode: {name: round(us, 1) for name, us in values.items()} for mode, values in found.items()}


def _chain_us(maker: Callable[[nn.Module], nn.Module], layers: int, training: bool, device: str, count: int) -> float:
    torch._dynamo.reset()
    made = [nn.Linear(256, 256, bias=False, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    model = maker(nn.Sequential(*made).train(training))
    x = torch.randn(16, 256, device=device, dtype=torch.bfloat16, requires_grad=training)
    dy = torch.randn_like(x)

    def step() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.backward(dy)

    for _ in range(3):
        step()
    found = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        found.append(1e6 * (time.perf_counter() - start) / count)  # narrow layers: the GPU keeps up
    return min(found)


def rates(size: int, device: str) -> dict[str, float]:
    """TFLOP/s of float32 products, with TF32 and without."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    before, found = torch.backends.cuda.matmul.allow_tf32, {}
    for name, allowed in (("float32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found[name] = float(f"{2e-6 * size**3 / gpu_us(lambda: a @ b):.4g}")
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def measured(device: str, tiny: bool) -> dict[str, Any]:
    rows, widths, elements = TINY if tiny else (ROWS, WIDTHS, ELEMENTS)
    grid = []
    for m in rows:
        for k in widths:
            for n in widths:
                grid.append([m, k, n, *gemm_point(m, k, n, device)])
        print(f"M {m}: {len(grid)} points", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return {
        "machine": machine(device),
        "source": "measured",
        "columns": list(COLUMNS),
        "gemm": grid,
        "casts": casts(elements, device),
        "host": host(device, 3 if tiny else 50),
        "rates": rates(256 if tiny else 8192, device),
    }


# What the estimate is made from: TFLOP/s of large products and TB/s of large casts on one H100 (docs/performance.md).
RATES = dict(zip(COLUMNS, (740, 1310, 1220, 1290, 1190, 960, 780), strict=True))
PROCESSORS, TILES, START = 132, ((128, 256, 1.0), (128, 128, 0.85), (64, 64, 0.45)), 3.0  # us until a product runs
PASSES = {  # kind -> bytes per element over all passes, TB/s, launches
    "rows": (3, 2.6, 1), "transposed": (3, 2.7, 1), "both": (4, 2.6, 1), "current": (5, 2.6, 2), "current_both": (6, 2.6, 2),
    "row": (5, 2.4, 2), "row_both": (6, 2.3, 2), "block": (3, 2.6, 1), "block_both": (4, 1.7, 1),
}  # fmt: skip


def estimated_gemm(m: int, n: int, k: int, column: str) -> float:
    """us: full waves of output tiles, the best of three tile sizes, K split where tiles are few; never faster than the memory."""
    size = 2 if column == "bf16" else 1
    memory = (size * (m * k + n * k) + 2 * m * n) / 2.6e6
    found = []
    for tile_m, tile_n, efficiency in TILES:
        tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n)
        split = max(1, min(8, PROCESSORS // tiles, k // 1024))
        waves = math.ceil(tiles * split / PROCESSORS)
        work = 2 * tile_m * tile_n * (k / split) / (RATES[column] * 1e6 / PROCESSORS * efficiency)
        found.append(waves * work + (2.0 if split > 1 else 0.0))
    return START + max(min(found), memory)


def estimated() -> dict[str, Any]:
    """The same table from RATES: a stand-in until somebody measures it."""
    grid = [
        [m, k, n, *(round(estimated_gemm(m, n, k, c), 3) for c in COLUMNS), *(round(estimated_gemm(n, k, m, c), 3) for c in COLUMNS)]
        for m in ROWS
        for k in WIDTHS
        for n in WIDTHS
    ]
    cast_times = {
        kind: [[count, round(2.0 * launches + count * size / (rate * 1e6), 3)] for count in ELEMENTS]
        for kind, (size, rate, launches) in PASSES.items()
    }
    return {
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "source": "estimated",
        "columns": list(COLUMNS),
        "gemm": grid,
        "casts": cast_times,
        "host": {"training": {"fixed": 60.0, "bf16": 25.0, "fp8": 110.0}, "inference": {"fixed": 30.0, "bf16": 8.0, "fp8": 25.0}},
        "rates": {"float32": 51.0, "tf32": 400.0},
    }


CHANGED, PEER = ("own_precise", "block"), "tensor_precise"
CHANGED_CASTS, PEER_CAST = ("row_both", "block", "block_both"), "rows"


def transferred(data: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`data` with products and casts that have become much faster since as `other`, of the same processors, has them.

    In proportion to torch's precise product, and to the cast by one scale, point by point.
    """
    there = {tuple(row[:3]): row[3:] for row in other["gemm"]}
    own, peer = ([i + j for i in (0, len(COLUMNS)) for j in map(COLUMNS.index, names)] for names in (CHANGED, (PEER,) * len(CHANGED)))
    grid = []
    for row in data["gemm"]:
        here, those = list(row[3:]), there[tuple(row[:3])]
        for column, by in zip(own, peer, strict=True):
            here[column] = round(those[column] * here[by] / those[by], 3)
        grid.append([*row[:3], *here])
    pairs = list(zip(data["casts"][PEER_CAST], other["casts"][PEER_CAST], strict=True))  # the same sizes, within a percent
    faster = {count: (size, us / theirs) for (size, us), (count, theirs) in pairs}
    made = {kind: [[faster[count][0], round(us * faster[count][1], 3)] for count, us in other["casts"][kind]] for kind in CHANGED_CASTS}
    note = {"columns": [*CHANGED, *CHANGED_CASTS], "of": other["machine"], "in proportion to": [PEER, PEER_CAST]}
    return {**data, "gemm": grid, "casts": {**data["casts"], **made}, "transferred": note}


def dump(data: dict[str, Any]) -> str:
    """JSON with one line per point."""
    gemm = ",\n".join("  " + json.dumps(row) for row in data["gemm"])
    rest = {key: value for key, value in data.items() if key != "gemm"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()]
    return "{\n" + ",\n".join(lines) + f',\n "gemm": [\n{gemm}\n ]\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into fp8fx/costs, as the table of this device")
    parser.add_argument("--json", type=writable, help="write the table here")
    parser.add_argument("--estimate", action="store_true", help="measure nothing")
    parser.add_argument("--tiny", action="store_true", help="a few small points on any device: only whether the program runs")
    tables, names = sorted(path.stem for path in FOLDER.glob("*.json")), ("FROM", "INTO")
    what = f"tables in fp8fx/costs ({', '.join(tables)}): measure nothing, write INTO anew"
    parser.add_argument("--transfer", nargs=2, metavar=names, choices=tables, help=what)
    options = parser.parse_args(argv)
    if options.transfer:
        other, data = (json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in options.transfer)
        path = options.json or FOLDER / f"{options.transfer[1]}.json"
        path.write_text(dump(transferred(data, other)), encoding="utf-8")
        print(f"products {', '.join(CHANGED)} and casts {', '.join(CHANGED_CASTS)} of {options.transfer[0]} written to {path}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tiny and options.write:
        parser.error("--tiny measures nothing worth shipping: give --json a path instead of --write")
    if device == "cpu" and not options.tiny and not options.estimate:
        parser.error("there is no CUDA GPU: only --tiny and --estimate run here")
    if not options.estimate:
        need_triton()
    data = estimated() if options.estimate else measured(device, options.tiny)
    Table.of(data)  # it loads
    path = options.json or (FOLDER / f"{table_name(data['machine']['device'])}.json" if options.write else None)
    if path:
        path.write_text(dump(data), encoding="utf-8")
    print(f"{data['source']}: {len(data['gemm'])} points, host {data['host']}" + (f", written to {path}" if path else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
