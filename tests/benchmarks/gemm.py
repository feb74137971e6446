"""scaled_mm against torch's own FP8 matrix product (cuBLASLt), in TFLOP/s, on the sizes of a Llama's linears.

    python tests/benchmarks/gemm.py [--json figures.json] [--picture gemm.svg] [--rounds 9]
    python tests/benchmarks/gemm.py --configs

Random data, bf16 output, K-major operands. Columns: our kernel and torch's for one scale per tensor and one per row and column, fast
accumulation; ours with e5m2 x e5m2, which torch refuses; torch's bf16 product; both with precise accumulation; ours with 1x128 and 128x128
blocks. Bars, each over all sizes: ours over torch's at least 0.97 (tensor, row), e5m2 x e5m2 over e4m3 x e4m3 at least 0.95.

--configs prints another table, without bars: configurations for the products of `direct`, e5m2 x e5m2, in the sizes of a Llama block's
forward and backward, written as they are, rounded to nearest (outputs) and stochastically (gradients); and for those of `blockwise`, whose
second operand has blocks of 128x128 (outputs, gradients of inputs) or 1x128 (of weights).

--few-rows prints a third, of the products of a token or a few at a time, whose time is that of reading W [N, K]: microseconds, and GB/s.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benchmark_report import Bar, Report, Row, device_for, error_text, need_triton, parser
from gpu_timing import Call, interleaved
from torch import Tensor

if __name__ == "__main__":
    need_triton()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for --tiny; Triton reads it when a kernel is defined

from fp8fx.kernels.cast import Rounding
from fp8fx.kernels.scaled_mm import scaled_mm
from fp8fx.kernels.scaled_mm_configs import CONFIGS, Config

SHAPES = [
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
    (16384, 16384, 16384),
    (2048, 4096, 4096),
]
TINY = [(64, 128, 128)]
FAST = ("tensor", "torch tensor", "row", "torch row", "e5m2 x e5m2")  # what the bars compare takes turns among itself
OTHERS = ("torch bf16", "precise", "torch precise", "blocks")
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def candidates(m: int, n: int, k: int, device: str) -> dict[str, Call]:
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    a, b = x.to(E4), w.to(E4).t()
    a5, b5 = x.to(E5), w.to(E5).t()
    one = torch.tensor(0.5, device=device)
    rows, columns = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5
    blocks_a, blocks_b = torch.rand(m, k // 128, device=device), torch.rand(k // 128, n // 128, device=device)

    def torch_mm(scale_a: Tensor, scale_b: Tensor, fast: bool) -> Call:
        return lambda: torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "tensor": lambda: scaled_mm(a, b, one, one),
        "torch tensor": torch_mm(one, one, True),
        "row": lambda: scaled_mm(a, b, rows, columns),
        "torch row": torch_mm(rows, columns, True),
        "e5m2 x e5m2": lambda: scaled_mm(a5, b5, one, one),
        "torch bf16": lambda: x @ w.t(),
        "precise": lambda: scaled_mm(a, b, one, one, accumulate="precise"),
        "torch precise": torch_mm(one, one, False),
        "blocks": lambda: scaled_mm(a, b, blocks_a, blocks_b, block_a=(1, 128), block_b=(128, 128)),
    }


def measure(m: int, n: int, k: int, options: Any) -> Row:
    row: Row = {"m": m, "n": n, "k": k}
    try:
        calls = candidates(m, n, k, options.device)
        repeats = 1 if options.tiny else max(1, round(2e12 / (m * n * k)))
        seconds: dict[str, float] = {}
        for group in (FAST, OTHERS):
            seconds |= interleaved({name: [calls[name]] * repeats for name in group}, options.rounds)
        row["tflops"] = {name: 2e-12 * m * n * k / time for name, time in seconds.items()}
    except Exception as error:  # out of memory, a kernel that fails: part of the table
        row["error"] = error_text(error)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return row


def line(row: Row) -> str:
    figures = row.get("error") or "".join(f"{row['tflops'][name]:14.4g}" for name in (*FAST, *OTHERS))
    return f"{row['m']}, {row['n']}, {row['k']}".rjust(20) + figures


def bars(rows: list[Row]) -> list[Bar]:
    def worst(name: str, peer: str) -> float | None:
        ratios = [row["tflops"][name] / row["tflops"][peer] if "tflops" in row else math.nan for row in rows]
        return min(ratios, key=lambda ratio: (not math.isnan(ratio), ratio)) if ratios else None

    return [
        Bar("tensor over torch, lowest", worst("tensor", "torch tensor"), 0.97),
        Bar("row over torch, lowest", worst("row", "torch row"), 0.97),
        Bar("e5m2 x e5m2 over e4m3 x e4m3, lowest", worst("e5m2 x e5m2", "tensor"), 0.95),
    ]


def draw(figure: Any, rows: list[Row]) -> None:
    """One group of bars per size."""
    axes, rows = figure.add_subplot(), [row for row in rows if "tflops" in row]
    figure.set_size_inches(10, 4.5)
    names = ("torch bf16", "torch tensor", "tensor", "torch row", "row", "e5m2 x e5m2", "torch precise", "precise")
    for i, name in enumerate(names):
        places = [k + i / (len(names) + 1.5) for k in range(len(rows))]
        axes.bar(places, [row["tflops"][name] for row in rows], 1 / (len(names) + 1.5), label=name)
    axes.set_xticks([k + 0.4 for k in range(len(rows))], [f"{row['m']}\n{row['n']}\n{row['k']}" for row in rows])
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


# Promotion to float32 is every BLOCK_K of a precise configuration.
CONFIGURED = {
    "fast": {"large": CONFIGS["large"], "medium": CONFIGS["medium"]},
    "precise": {
        "medium": CONFIGS["medium"],
        "precise": CONFIGS["precise"],
        "specialized": CONFIGS["specialized"],
        "64x256, 2 programs": Config(64, 256, 128, 8, True, False, 4, 2, 2),
        "256x128, every 256": Config(256, 128, 256, 4, True, False, 8, 2),
        "128x128, every 256": Config(128, 128, 256, 8, True, False, 4, 3),
    },
}
BLOCKED = {name: CONFIGS[name] for name in ("blocked", "specialized_blocked")}
PRODUCTS = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (4096, 4096, 8192), (14336, 4096, 8192), (4096, 14336, 8192)]


def configured(m: int, n: int, k: int, options: Any) -> dict[str, float]:
    """TFLOP/s by accumulation, configuration and ending; torch's own precise e5m2 x e4m3 and its blocks beside them."""
    cuda = options.device == "cuda"  # elsewhere Triton's interpreter runs, and Gluon has none
    a, b = (torch.randn(rows, k, device=options.device, dtype=torch.bfloat16).to(E5) for rows in (m, n))
    one, rng = torch.ones((), device=options.device), torch.tensor([1, 2, 3], device=options.device)
    how = Rounding("stochastic", "nonfinite", rng, 7)
    endings: dict[str, dict[str, Any]] = {
        "as it is": {},
        "nearest": {"round_to": "e5m2"},
        "stochastic": {"round_to": "e5m2", "how": how},
    }
    calls: dict[str, Call] = {}
    for accumulate, made in CONFIGURED.items():
        for name, config in made.items():
            if config.specialized and not cuda:
                continue
            for ending, end in endings.items():
                calls[f"{accumulate} {name} {ending}"] = lambda end=end, config=config, accumulate=accumulate: scaled_mm(  # type: ignore[misc]
                    a, b.t(), one, one, accumulate=accumulate, config=config, **end
                )
    left, other, scale = a.float().to(E4), b.float().to(E4).t(), torch.rand(m, k // 128, device=options.device)
    for width in (128, 1):
        scales = torch.rand(k // 128, n // width, device=options.device)
        for name, config in BLOCKED.items():
            if cuda or not config.specialized:
                calls[f"{name}, 1x128 by 128x{width}"] = lambda config=config, scales=scales, width=width: scaled_mm(  # type: ignore[misc]
                    left, other, scale, scales, block_a=(1, 128), block_b=(128, width), config=config
                )
    if cuda:
        calls["precise torch e5m2 x e4m3"] = lambda: torch._scaled_mm(a, other, one, one, out_dtype=torch.bfloat16, use_fast_accum=False)
        kinds = torch.nn.functional.ScalingType
        outer = scale.t().contiguous().t()  # as torch wants it
        wide, narrow = torch.rand(n // 128, k // 128, device=options.device).t(), torch.rand(k // 128, n, device=options.device).t()
        for width, scales, kind in ((128, wide, kinds.BlockWise128x128), (1, narrow, kinds.BlockWise1x128)):
            calls[f"torch, 1x128 by 128x{width}"] = lambda scales=scales, kind=kind: torch.nn.functional.scaled_mm(  # type: ignore[misc]
                left, other, outer, kinds.BlockWise1x128, scales, kind, output_dtype=torch.bfloat16
            )
    repeats = 1 if options.tiny else max(1, round(2e12 / (m * n * k)))
    seconds = interleaved({name: [call] * repeats for name, call in calls.items()}, options.rounds)
    return {name: 2e-12 * m * n * k / time for name, time in seconds.items()}


FEW, WEIGHTS = (1, 4, 16, 32, 64, 128), [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096)]  # M; (N, K)
CACHE = 2**28  # bytes of weights that take turns, more than the L2 cache holds


def few_rows(options: Any) -> int:
    """Output [M, N] of M rows, against torch's FP8 product and its bf16 one."""
    sizes = [(16, 32, 64)] if options.tiny else [(m, n, k) for n, k in WEIGHTS for m in FEW]
    names = ("ours", "ours, rows", "torch", "torch, rows", "bf16")
    print(f"{'M, N, K':>20}" + "".join(f"{name:>14}" for name in names) + "   us; GB/s of W, ours and torch")
    for m, n, k in sizes:
        count = 1 if options.tiny else max(2, CACHE // (n * k))
        one, rows, columns = (
            torch.ones((), device=options.device),
            torch.ones(m, 1, device=options.device),
            torch.ones(1, n, device=options.device),
        )
        x = torch.randn(m, k, device=options.device, dtype=torch.bfloat16)
        a, weights = x.to(E4), [torch.randn(n, k, device=options.device, dtype=torch.bfloat16) for _ in range(count)]
        codes = [w.to(E4).t() for w in weights]
        pairs = (("ours", one, one), ("ours, rows", rows, columns), ("torch", one, one), ("torch, rows", rows, columns))
        calls: dict[str, list[Call]] = {"bf16": [partial(torch.mm, x, w.t()) for w in weights]}
        for name, left, right in pairs:
            product = scaled_mm if name.startswith("ours") else _torch_product
            calls[name] = [partial(product, a, b, left, right) for b in codes]
        seconds = interleaved(calls, options.rounds)
        rates = "".join(f"{n * k / seconds[name] / 1e9:8.0f}" for name in ("ours", "torch"))
        print(f"{m}, {n}, {k}".rjust(20) + "".join(f"{1e6 * seconds[name]:14.2f}" for name in names) + rates, flush=True)
    return 0


def _torch_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    made: Tensor = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)
    return made


def compare(options: Any) -> int:
    for m, n, k in TINY if options.tiny else PRODUCTS:
        print(f"M, N, K = {m}, {n}, {k}", flush=True)
        for name, tflops in configured(m, n, k, options).items():
            print(f"  {name:<44}{tflops:8.4g} TFLOP/s", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--configs", action="store_true", help="compare tile sizes for the products of `direct` instead")
    made.add_argument("--few-rows", action="store_true", help="compare products of few rows instead")
    options = made.parse_args(argv)
    options.device = device_for(options, made)
    if options.configs or options.few_rows:
        return compare(options) if options.configs else few_rows(options)
    report = Report("gemm", options, options.device, ("m", "n", "k"))
    print(f"{'M, N, K':>20}" + "".join(f"{name:>14}" for name in (*FAST, *OTHERS)) + "   TFLOP/s")
    if report.measures:
        for shape in TINY if options.tiny else SHAPES:
            report.add(row := measure(*shape, options))
            print(line(row), flush=True)
    else:
        print("\n".join(map(line, report.rows)))
    return report.finish(bars(report.rows), draw)


if __name__ == "__main__":
    sys.exit(main())
