"""Fake quantization on the CPU, compiled, against torch's own casts:  python tests/benchmarks/cpu_emulation.py [--json FILE]

Each contender turns the same 2^24 float32 numbers into grid values in a preallocated output. Runs are interleaved, so that what
else happens on the machine meets all alike; the figure is the median of 15. Bars, in the same run:

    compiled e4m3fn and e5m2      at least 2 x as fast as torch's eager clamp + cast + decode of the same format
    compiled eXmY, any            at least 2 x as fast as the faster of these two, and at most 1.05 x the time of compiled e4m3fn
    compiled, any                 at least 3 x as fast as qtorch's float_quantize with the same bits, where `qtorch` can be imported

The C++ of qtorch 0.3.0 is compiled here with -O3, which it does not ask for itself (that needs ninja and a compiler); it runs on one
thread and allocates its output. int8 is shown too.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_report import writable
from torch import Tensor
from torch.utils.cpp_extension import load

from fp8fx import formats
from fp8fx.numerics import round_to_format

HARDWARE = ("e4m3fn", "e5m2")
EMULATED = ("e4m3ieee", "e3m4fn", "e2m5", "e3m2", "e5m2fnuz")
SPEEDUP, NOISE, QTORCH = 2.0, 1.05, 3.0

Run = Callable[[Tensor, Tensor], None]


def compiled(name: str) -> Run:
    """Inductor's form of `out = round_to_format(x)`: one pass over memory."""

    def run(x: Tensor, out: Tensor) -> None:
        out.copy_(round_to_format(x, name))

    return torch.compile(run, fullgraph=True, dynamic=False)


def eager(name: str, count: int) -> Run:
    """torch's own operators, into buffers that are allocated once."""
    format_ = formats.get(name)
    clamped, codes = torch.empty(count), torch.empty(count, dtype=format_.torch_dtype)

    def run(x: Tensor, out: Tensor) -> None:
        torch.clamp(x, -format_.max, format_.max, out=clamped)
        codes.copy_(clamped)
        out.copy_(codes)

    return run


@functools.cache
def qtorch_module() -> Any:
    """The C++ of the installed qtorch, compiled with -O3; None where there is none or it does not compile."""
    found = importlib.util.find_spec("qtorch")
    if found is None or found.submodule_search_locations is None:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "quant" / "quant_cpu"
    sources = [str(folder / f"{name}.cpp") for name in ("quant_cpu", "bit_helper", "sim_helper")]
    try:
        return load("fp8fx_benchmark_qtorch", sources, extra_cflags=["-O3"])
    except (ImportError, RuntimeError, OSError) as error:
        print(f"qtorch does not compile here: {error}", file=sys.stderr)
        return None


def qtorch(name: str) -> Run | None:
    """qtorch's rounding to the same numbers of bits (ties away, no NaN); None where it cannot be had."""
    module, format_ = qtorch_module(), formats.get(name)
    if module is None:
        return None

    def run(x: Tensor, out: Tensor) -> None:
        module.float_quantize_nearest(x, format_.mantissa_bits, format_.exponent_bits)

    return run


def measure(runs: dict[str, Run], x: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds per contender."""
    out = torch.empty_like(x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compile, and touch every page
        run(x, out)
    order = list(runs.items())
    for turn in range(repeats):
        for name, run in order[turn % len(order) :] + order[: turn % len(order)]:  # nobody always follows the same neighbour
            start = time.perf_counter()
            run(x, out)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def bars(ms: dict[str, float]) -> list[tuple[str, float, str, bool]]:
    """(what, figure, bar, met) per bar."""
    rows = []
    for name in HARDWARE:
        ratio = ms[f"eager {name}"] / ms[f"compiled {name}"]
        rows.append((f"compiled {name} over eager cast", ratio, f">= {SPEEDUP}", ratio >= SPEEDUP))
    fastest = min(ms[f"eager {name}"] for name in HARDWARE)
    for name in EMULATED:
        ratio = fastest / ms[f"compiled {name}"]
        rows.append((f"compiled {name} over eager cast", ratio, f">= {SPEEDUP}", ratio >= SPEEDUP))
        ratio = ms[f"compiled {name}"] / ms["compiled e4m3fn"]
        rows.append((f"time of {name} over e4m3fn", ratio, f"<= {NOISE}", ratio <= NOISE))
    for name in (name for name in HARDWARE + EMULATED if f"qtorch {name}" in ms):
        ratio = ms[f"qtorch {name}"] / ms[f"compiled {name}"]
        rows.append((f"compiled {name} over qtorch", ratio, f">= {QTORCH}", ratio >= QTORCH))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=writable, help="write the figures here")
    parser.add_argument("--count", type=int, default=2**24, help="elements (default 2^24)")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(arguments.count) * 4
    torch._dynamo.config.recompile_limit = 64  # every format is the same code, compiled anew
    runs = {f"compiled {name}": compiled(name) for name in (*HARDWARE, *EMULATED, "int8")}
    runs |= {f"eager {name}": eager(name, arguments.count) for name in HARDWARE}
    runs |= {f"qtorch {name}": run for name in HARDWARE + EMULATED if (run := qtorch(name)) is not None}
    ms = measure(runs, x, arguments.repeats)
    rows = bars(ms)

    print(f"fake quantization of {arguments.count} float32, median of {arguments.repeats}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, figure in ms.items():
        print(f"  {name:<20} {figure:8.1f} ms")
    for what, figure, bar, met in rows:
        print(f"  {'PASS' if met else 'FAIL'}  {what:<36} {figure:6.2f}   bar {bar}")
    if arguments.json:
        record = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(), "count": arguments.count}
        checks = [{"what": what, "figure": figure, "bar": bar, "met": met} for what, figure, bar, met in rows]
        arguments.json.write_text(json.dumps(record | {"median_ms": ms, "bars": checks}, indent=2) + "\n")
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
