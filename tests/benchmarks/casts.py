"""The memory-bound kernels against the bandwidth of a bf16 copy, in GB/s, each byte that must move counted once.

    python tests/benchmarks/casts.py [--json figures.json] [--picture casts.svg] [--rounds 9] [--shapes 0:1]

bf16 input, e4m3fn output. Buffers rotate where one set would stay in the L2 cache. `Inductor` is what torch.compile makes of the same
formula in torch's own operations. Bars, at 8192 x 14336: cast, transpose and amax in one pass at least 0.85 of the copy, SwiGLU
to FP8 with transpose and amax at least 0.90.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark_report import Bar, Report, Row, device_for, error_text, need_triton, parser, sliced
from gpu_timing import interleaved
from torch import Tensor
from torch.nn import functional as F

if __name__ == "__main__":
    need_triton()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for --tiny; Triton reads it when a kernel is defined

from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.amax import amax, amax_each
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.delayed import delayed_update
from fp8fx.kernels.norm_cast import norm_cast

SHAPES = [(8192, 14336), (8192, 4096), (16384, 8192), (8191, 4096)]
TINY = [(64, 128)]
COPY, BAR, SWIGLU = "copy", "cast+transpose+amax", "SwiGLU to FP8"
BARS = {BAR: 0.85, SWIGLU: 0.90}
Kernels = dict[str, tuple[Callable[[Tensor], Any], float]]


def _encoded(y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = (y.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q, q.t().contiguous(), y.abs().amax().float()


def kernels(device: str) -> Kernels:
    """name -> (call on x, bytes that must move per element)."""
    scale, largest = torch.tensor(0.01, device=device), torch.zeros((), device=device)
    largest_u, others = torch.zeros((), device=device), dict[int, Tensor]()

    def partner(x: Tensor) -> Tensor:
        """A second tensor like x, the same for every call."""
        if x.data_ptr() not in others:
            others[x.data_ptr()] = torch.randn_like(x)
        return others[x.data_ptr()]

    compiled = functools.partial(torch.compile, backend="inductor" if device == "cuda" else "eager", dynamic=False)
    inductor = compiled(_encoded)
    inductor_current = compiled(lambda x: _encoded(x, x.abs().amax().float() / 448))
    inductor_swiglu = compiled(lambda x, u: _encoded(F.silu(x) * u, scale))
    how = Rounding("stochastic", rng=torch.tensor([1, 2, 3], device=device), key=7)
    return {
        COPY: (torch.clone, 4),
        "amax": (amax, 2),
        "amax row+column": (lambda x: amax_each(x, ("row", "column")), 2),
        "cast": (lambda x: cast(x, "e4m3fn", scale), 3),
        "cast+amax": (lambda x: cast(x, "e4m3fn", scale, amax=largest), 3),
        "cast+transpose": (lambda x: cast(x, "e4m3fn", scale, layout="both"), 4),
        BAR: (lambda x: cast(x, "e4m3fn", scale, layout="both", amax=largest), 4),
        "Inductor, the same": (lambda x: inductor(x, scale), 4),
        "the same, e5m2": (lambda x: cast(x, "e5m2", scale, layout="both", amax=largest), 4),
        "the same, stochastic": (lambda x: cast(x, "e5m2", scale, layout="both", how=how, amax=largest), 4),
        "transpose only": (lambda x: cast(x, "e4m3fn", scale, layout="transposed"), 3),
        "current, both": (lambda x: cast_current(x, "e4m3fn", layout="both"), 6),
        "Inductor, current": (inductor_current, 6),
        "current, row+column": (lambda x: cast_current(x, "e4m3fn", "row", "column", "both"), 6),
        "blocks 1x128": (lambda x: cast_block(x, "e4m3fn"), 3),
        "blocks 1x128, both": (lambda x: cast_block(x, "e4m3fn", layout="both"), 4),
        "blocks 128x128, both": (lambda x: cast_block(x, "e4m3fn", (128, 128), layout="both"), 4),
        SWIGLU: (lambda x: activation_cast(x, partner(x), "silu", "e4m3fn", scale, amax=largest), 6),
        "Inductor, SwiGLU": (lambda x: inductor_swiglu(x, partner(x)), 6),
        "RMSNorm to FP8": (lambda x: norm_cast(x, None, None, "e4m3fn", "rms", 1e-6, scale, amax=largest), 4),
        "gelu to FP8": (lambda x: activation_cast(x, None, "gelu", "e4m3fn", scale, amax=largest), 4),
        "SwiGLU backward": (
            lambda x: activation_backward_cast(x, partner(x), x, "silu", "e5m2", scale, scale, amax=largest, amax_u=largest_u),
            8,
        ),
    }


def measure(shape: tuple[int, int], options: Any) -> Row:
    """GB/s of every kernel. One that fails on a first call is left out and its error kept; --tiny has no call but the first."""
    row: Row = {"m": shape[0], "k": shape[1], "gbs": {}, "errors": {}}
    xs = [torch.randn(shape, device=options.device).to(torch.bfloat16) for _ in range(1 if options.tiny else 3)]
    table = kernels(options.device)
    for name, (call, _) in [] if options.tiny else list(table.items()):
        try:
            call(xs[0])
        except Exception as error:
            row["errors"][name] = error_text(error)
            del table[name]
    seconds = interleaved({name: [lambda x=x, call=call: call(x) for x in xs] for name, (call, _) in table.items()}, options.rounds)
    row["gbs"] = {name: xs[0].numel() * table[name][1] / time / 1e9 for name, time in seconds.items()}
    torch._dynamo.reset()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return row


def update_time(options: Any) -> float:
    """Microseconds of the update of delayed scaling for 512 slots with a history of 16."""
    count = 4 if options.tiny else 512
    slots = [torch.rand(count, 16, device=options.device), *(torch.rand(count, device=options.device) + 0.5 for _ in range(3))]
    return 1e6 * interleaved({"update": [lambda: delayed_update(*slots)] * (1 if options.tiny else 20)}, options.rounds)["update"]


def print_table(rows: list[Row]) -> None:
    shapes = [row for row in rows if "gbs" in row]
    print(f"{'GB/s, share of the copy':>24}" + "".join(f"{row['m']} x {row['k']}".rjust(18) for row in shapes))
    for name in dict.fromkeys(name for row in shapes for name in (*row["gbs"], *row["errors"])):
        cells = [
            f"{rate:10.4g} {rate / row['gbs'][COPY]:6.2f} " if (rate := row["gbs"].get(name)) else f"  {row['errors'][name]}"
            for row in shapes
        ]
        print(f"{name:>24}" + "".join(cells))
    for row in rows:
        if "update_us" in row:
            print(f"delayed update of 512 slots with a history of 16: {row['update_us']:.1f} us")


def bars(rows: list[Row]) -> list[Bar]:
    first = next((row for row in rows if "gbs" in row), None)

    def share(name: str) -> float | None:
        if first is None:
            return None
        return first["gbs"][name] / first["gbs"][COPY] if name in first["gbs"] else math.nan

    return [Bar(f"{name} over copy, {first and first['m']} x {first and first['k']}", share(name), least) for name, least in BARS.items()]


def draw(figure: Any, rows: list[Row]) -> None:
    """Shares of the copy's bandwidth at the first size; marks where the bars lie."""
    first = next(row for row in rows if "gbs" in row)
    names = list(first["gbs"])
    axes = figure.add_subplot()
    figure.set_size_inches(8, 1 + 0.28 * len(names))
    colors = ["#999999" if name.startswith("Inductor") or name == COPY else "#2b6cb0" for name in names]
    axes.barh(names, [first["gbs"][name] / first["gbs"][COPY] for name in names], color=colors)
    for name, least in BARS.items():
        if name in names:
            axes.plot([least] * 2, [names.index(name) - 0.4, names.index(name) + 0.4], color="#c53030", linewidth=2)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of the bandwidth of a bf16 copy, {first['m']} x {first['k']} (grey: torch; red: the bar)")


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--shapes", default=":", help="a slice of the list of sizes, as 0:1")
    options = made.parse_args(argv)
    options.device = device_for(options, made)
    shapes = sliced(TINY if options.tiny else SHAPES, options.shapes)
    report = Report("casts", options, options.device, ("m", "k"))
    if report.measures:
        for shape in shapes:
            report.add(measure(shape, options))
        report.add({"update_us": update_time(options)})
    print_table(report.rows)
    return report.finish(bars(report.rows), draw)


if __name__ == "__main__":
    sys.exit(main())
