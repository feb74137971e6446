"""Arithmetic studies on the CPU against a float product:  python tests/benchmarks/arithmetic.py [--large] [--json FILE] [--tiny]

Operands hold E4M3 values, 512^3. Every figure is the least of some runs in CPU seconds of this process with one thread, so that what else
happens on the machine counts little; each contender runs beside its own float product. `compiled` excludes Inductor's compilation.

--large     also one 4096^3 product of each kind, in a process of its own, for its peak memory (minutes)
--tiny      64^3 and 128^3: does it run? The figures mean nothing and fail no bar

Bars:  an approximate multiplier      at most 20 x a float product
       rounded products, compiled     at most 200 x
       either at 4096^3               at most 2 GiB beyond operands
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from benchmark_report import writable
from torch import Tensor

from fp8fx.arithmetic.product import form_of, product
from fp8fx.arithmetic.spec import Arithmetic

MULTIPLIER, ROUNDED, MEMORY = 20.0, 200.0, 2.0
FORMATS = ("e4m3fn", "e4m3fn")
# text -> bar on its time over a float product's, compiled if it runs in tiles; None: reported only
CONTENDERS: dict[str, float | None] = {
    "multiplier=mitchell": MULTIPLIER,
    "products=float16": ROUNDED,
    "products=e5m2": ROUNDED,
    "products=e4m3fn/overflow=saturate": ROUNDED,
    "products=e5m6/rounding=toward_zero": ROUNDED,
    "accumulate=float16": None,
    "products=bfloat16/accumulate=bfloat16": None,
    "accumulate=hopper_fast": None,
    "accumulate=hopper_fast/chunk=128": None,
    "multiplier=mitchell/accumulate=float16": None,
}
LARGE = ("multiplier=mitchell", "products=e5m2")


def operands(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(torch.float8_e4m3fn).float() for _ in range(2))
    return a, b


def least(run: Callable[[], object], beside: Callable[[], object], repeats: int) -> tuple[float, float]:
    """CPU milliseconds of `run`, and of `beside`, the least of `repeats` turns."""
    run()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, found in zip((run, beside, beside), (times[0], times[1], times[1]), strict=True):
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
    return 1e3 * min(times[0]), 1e3 * min(times[1])


def measure(text: str, size: int, repeats: int, eager: bool, compiled: bool) -> dict[str, object]:
    a, b = operands(size)
    arithmetic = Arithmetic.parse(text)
    form = form_of(arithmetic, FORMATS)
    row: dict[str, object] = {"arithmetic": text, "form": form, "bar": CONTENDERS[text]}
    if form != "tiles" or eager:
        row["ms"], row["float_ms"] = least(lambda: product(a, b, arithmetic, FORMATS), lambda: a @ b, repeats)
        row["ratio"] = row["ms"] / row["float_ms"]  # type: ignore[operator]
    if form == "tiles" and compiled:
        ms, float_ms = least(lambda: product(a, b, arithmetic, FORMATS, compiled=True), lambda: a @ b, repeats)
        row |= {"compiled_ms": ms, "compiled_ratio": ms / float_ms}
        row["same_bits"] = torch.equal(product(a[:40], b, arithmetic, FORMATS, compiled=True), product(a[:40], b, arithmetic, FORMATS))
    return row


def peak() -> float:
    """GiB this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def large(text: str, size: int, compiled: bool) -> None:
    """In a process of its own: one product; prints its extra peak memory in GiB and CPU seconds as JSON."""
    arithmetic = Arithmetic.parse(text)
    a, b = operands(size)
    product(a[:64, :64].contiguous(), b[:64, :64].contiguous(), arithmetic, FORMATS, compiled=compiled)  # libraries, compiled code
    before, start = peak(), time.process_time()
    product(a, b, arithmetic, FORMATS, compiled=compiled)
    print(json.dumps({"arithmetic": text, "size": size, "gib": peak() - before, "seconds": time.process_time() - start}))


def run_large(text: str, size: int, compiled: bool) -> dict[str, object]:
    command = [sys.executable, "-P", __file__, "--one-large", text, "--size", str(size), *(["--no-compile"] if not compiled else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def judged(value: object, bar: float | None) -> str:
    if bar is None or not isinstance(value, float):
        return ""
    return f"{'PASS' if value <= bar else 'FAIL'} (bar {bar:g})"


def show(row: dict[str, object]) -> str:
    if "gib" in row:
        return f"{row['arithmetic']!s:42} {row['size']}^3: {row['gib']:.2f} GiB, {row['seconds']:.0f} CPU s  {judged(row['gib'], MEMORY)}"
    text = f"{row['arithmetic']!s:42} {row['form']!s:9}"
    if "ms" in row:
        text += f" {row['ms']:8.1f} ms {row['ratio']:6.1f} x"
    if "compiled_ms" in row:
        text += f"  compiled {row['compiled_ms']:8.1f} ms {row['compiled_ratio']:6.1f} x, bits {'equal' if row['same_bits'] else 'DIFFER'}"
    return f"{text}  {judged(row.get('compiled_ratio', row.get('ratio')), row['bar'])}"  # type: ignore[arg-type]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=writable)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave Inductor out (a minute per arithmetic on a slow machine)")
    parser.add_argument("--no-eager", action="store_true", help="compiled tiles only")
    parser.add_argument("--only", action="append", help="one arithmetic of those above, by its text; may be repeated")
    parser.add_argument("--one-large", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=512)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.one_large:
        large(given.one_large, given.size, not given.no_compile)
        return 0
    size, repeats = (64, 1) if given.tiny else (given.size, 3)
    rows = []
    for text in CONTENDERS if given.only is None else given.only:
        rows.append(measure(text, size, repeats, not given.no_eager, not given.no_compile) | ({"bar": None} if given.tiny else {}))
        print(show(rows[-1]), flush=True)
    for text in LARGE if given.large else ():
        rows.append(run_large(text, 128 if given.tiny else 4096, not given.no_compile))
        print(show(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "tiny": given.tiny, "torch": torch.__version__}, indent=1))
    return 0 if given.tiny else int(any("FAIL" in show(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
