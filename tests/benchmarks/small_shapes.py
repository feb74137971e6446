"""Never slower: one compiled linear layer, forward and backward, over bf16 torch.compile, at 40 sizes from tiny to large.

    python tests/benchmarks/small_shapes.py --json out.json --picture out.svg          about three minutes, most of it compiling
    python tests/benchmarks/small_shapes.py --shapes 0:20 --limit 540

Four candidates take turns at each size (M, K, N): `bf16`, nn.Linear under torch.compile; `again`, another such layer compiled the same
way, whose ratio to the first is what the measurement cannot tell; `fp8fx`, the same layer under fp8fx.compile with the default recipe,
where the cost model decides whether it runs in FP8; `torch`, what torch itself offers under torch.compile: amax, cast and
torch._scaled_mm for the three GEMMs, one scale per tensor. Times are wall clock, as users see them, the host's launches included.
Ratios are medians over the rounds of the ratio within a round. Turns are short and many: a host's speed drifts by a third within a second.

Bars: fp8fx over bf16 at least 0.98 everywhere; and wherever torch's cast + GEMM reaches 1.2, the layer really runs in FP8 (its plan
says so) and reaches at least 1.15.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark_report import Bar, Report, Row, device_for, error_text, parser, sliced
from torch import Tensor, nn

import fp8fx

WIDTHS = [
    *((256, 256), (256, 1024), (1024, 256), (1024, 1024), (1024, 4096)),
    *((4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096), (16384, 16384)),
]
ROWS = ((16, 512, 4096, 32768), (64, 1024, 2048, 8192))  # in turn
SHAPES = [(m, k, n) for i, (k, n) in enumerate(WIDTHS) for m in ROWS[i % 2]]
TINY = [(16, 64, 32), (64, 32, 64)]
CANDIDATES = ("bf16", "again", "fp8fx", "torch")
PAYS, REACHES, NEVER_BELOW = 1.2, 1.15, 0.98
LEAST_ROUNDS = 9  # also where steps are so long that these take longer than the time of a size
Step = Callable[[], None]


class TorchFP8(torch.autograd.Function):
    """Y = X W^T by torch._scaled_mm, each operand scaled by its amax: the straightforward way, with nothing fused by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        qx, sx = _cast(x, torch.float8_e4m3fn)
        qw, sw = _cast(w, torch.float8_e4m3fn)
        ctx.save_for_backward(qx, sx, qw, sw)
        return torch._scaled_mm(qx, qw.t(), sx, sw, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        qx, sx, qw, sw = ctx.saved_tensors
        qdy, sdy = _cast(dy, torch.float8_e5m2)
        dx = torch._scaled_mm(qdy, qw.t().contiguous().t(), sdy, sw, out_dtype=dy.dtype)
        dw = torch._scaled_mm(qdy.t().contiguous(), qx.t().contiguous().t(), sdy, sx, out_dtype=dy.dtype)
        return dx, dw


def _cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


class TorchLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return TorchFP8.apply(x, self.weight)


def build(m: int, k: int, n: int, device: str, recipe: str) -> tuple[dict[str, Step], Callable[[], str]]:
    """The candidates' steps, and what fp8fx decided, once it has run."""
    inner = "inductor" if device == "cuda" else "eager"
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=torch.bfloat16)
    kinds = (nn.Linear, nn.Linear, TorchLinear)
    plain, other, theirs = (cls(k, n, bias=False, device=device, dtype=torch.bfloat16) for cls in kinds)
    ours = fp8fx.compile(plain, recipe, inner=inner)
    models = {
        "bf16": torch.compile(plain, backend=inner, dynamic=False),
        "again": torch.compile(other, backend=inner, dynamic=False),
        "fp8fx": ours,
        "torch": torch.compile(theirs, backend=inner, dynamic=False),
    }

    def step_of(model: Any, weight: Tensor) -> Step:
        def step() -> None:
            x.grad = weight.grad = None
            model(x).backward(dy)

        return step

    weights = {"bf16": plain.weight, "again": other.weight, "fp8fx": plain.weight, "torch": theirs.weight}
    return {name: step_of(model, weights[name]) for name, model in models.items()}, lambda: fp8fx.plan(ours).rows[0].decision


def turns(steps: dict[str, Step], rounds: int, least: float, most: float, device: str) -> dict[str, list[float]]:
    """Seconds per step in each round. A turn lasts `least` seconds after a fifth as much unmeasured; every round has its own order.

    After `most` seconds no further round begins, once there are LEAST_ROUNDS.
    """
    shuffle, counts = random.Random(0), dict.fromkeys(steps, 2)
    found: dict[str, list[float]] = {name: [] for name in steps}

    def timed(step: Step, count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        _synchronize(device)
        return (time.perf_counter() - start) / count

    began = time.perf_counter()
    for i in range(-2, rounds):  # two rounds before the first say how many steps a turn has
        if i >= LEAST_ROUNDS and time.perf_counter() - began > most:
            break
        for name in shuffle.sample(list(steps), len(steps)):
            if i >= 0:
                timed(steps[name], math.ceil(counts[name] / 5))
            seconds = timed(steps[name], counts[name])
            if i < 0:
                counts[name] = max(1, math.ceil(least / seconds))
            else:
                found[name].append(seconds)
    return found


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(m: int, k: int, n: int, options: Any) -> Row:
    """A candidate that fails has no figures, and its error is kept."""
    row: Row = {"m": m, "k": k, "n": n, "errors": {}}
    start = time.perf_counter()
    steps, decision = build(m, k, n, options.device, options.recipe)
    for name, step in list(steps.items()):
        try:
            for _ in range(3):
                step()
        except Exception as error:
            row["errors"][name] = error_text(error)
            del steps[name]
    row["compile_s"] = time.perf_counter() - start
    gc.collect()
    gc.disable()
    try:
        found = turns(steps, options.rounds, options.turn, options.seconds, options.device)
    finally:
        gc.enable()
    row["us"] = {name: 1e6 * statistics.median(times) for name, times in found.items()}
    for name in CANDIDATES[1:]:
        if name in found and "bf16" in found:
            row[f"{name}_speed_up"] = statistics.median(base / each for base, each in zip(found["bf16"], found[name], strict=True))
    row["decision"] = decision() if "fp8fx" in found else "failed"
    return row


def attempt(shape: tuple[int, int, int], options: Any) -> Row:
    """The row of one size, or one that holds the error: the others go on."""
    try:
        row = measure(*shape, options)
    except Exception as error:  # out of memory: part of the table
        names = dict(zip("mkn", shape, strict=True))
        row = {**names, "us": {}, "decision": "failed", "errors": {"all": error_text(error)}}
    gc.collect()
    torch._dynamo.reset()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return row


def line(row: Row) -> str:
    us = "".join(f"{row['us'].get(name, math.nan):11.1f}" for name in ("bf16", "fp8fx", "torch"))
    ratios = "".join(f"{row.get(f'{name}_speed_up') or math.nan:9.3f}" for name in CANDIDATES[1:])
    errors = "".join(f"  {name}: {text}" for name, text in row["errors"].items())
    return f"{row['m']}, {row['k']}, {row['n']}".rjust(20) + f"{us}{ratios}  {row['decision']}{errors}"


def bars(rows: list[Row]) -> list[Bar]:
    ours = [row.get("fp8fx_speed_up") or math.nan for row in rows]
    paying = [row for row in rows if (row.get("torch_speed_up") or 0) >= PAYS]
    reached = [row.get("fp8fx_speed_up") or math.nan for row in paying]
    share = sum(row["decision"] == "fp8" for row in paying) / len(paying) if paying else None
    return [
        Bar(f"fp8fx over bf16, lowest of {len(rows)} sizes", _lowest(ours), NEVER_BELOW),
        Bar(f"share in FP8 of the {len(paying)} sizes where torch's cast + GEMM reaches {PAYS}", share, 1.0),
        Bar(f"fp8fx over bf16, lowest of those {len(paying)}", _lowest(reached), REACHES),
    ]


def _lowest(values: list[float]) -> float | None:
    return min(values, key=lambda value: (not math.isnan(value), value)) if values else None


def draw(figure: Any, rows: list[Row]) -> None:
    """Speed-up over bf16 time of the size: dots of ours, filled where FP8 runs, and of torch's own way."""
    axes = figure.add_subplot()
    figure.set_size_inches(8, 4.5)
    kinds = {
        "fp8fx, in FP8": ("fp8fx", "o", "#2b6cb0", [row for row in rows if row["decision"] == "fp8"]),
        "fp8fx, left in bf16": ("fp8fx", "x", "#2b6cb0", [row for row in rows if row["decision"] != "fp8"]),
        "torch's cast + GEMM": ("torch", "s", "#999999", rows),
    }
    for label, (name, marker, color, chosen) in kinds.items():
        points = [(row["us"]["bf16"], row[f"{name}_speed_up"]) for row in chosen if row.get(f"{name}_speed_up")]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label)
    axes.set_xscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("forward + backward of one linear layer in bf16, microseconds")
    axes.set_ylabel("times the speed of bf16")
    axes.legend()


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--recipe", default="hybrid")
    made.add_argument("--shapes", default=":", help="a slice of the list of sizes, as 0:20")
    made.add_argument("--rounds", type=int, default=100)
    made.add_argument("--turn", type=float, default=0.003, help="seconds of a candidate's turn in a round")
    made.add_argument(
        "--seconds", type=float, default=1.5, help=f"of a size, after which no round begins; {LEAST_ROUNDS} rounds in any case"
    )
    made.add_argument("--limit", type=float, help="seconds after which no further size starts")
    options = made.parse_args(argv)
    options.device, start = device_for(options, made), time.perf_counter()
    if options.tiny:
        options.rounds, options.turn = 1, 0.0
    report = Report("small_shapes", options, options.device, ("m", "k", "n"))
    print(
        f"{'M, K, N':>20}"
        + "".join(f"{f'{name} us':>11}" for name in ("bf16", "fp8fx", "torch"))
        + "".join(f"{f'{name} x':>9}" for name in CANDIDATES[1:])
    )
    if report.measures:
        for shape in sliced(TINY if options.tiny else SHAPES, options.shapes):
            if options.limit and time.perf_counter() - start > options.limit:
                print(f"not started, --limit {options.limit:.0f} s is over: {shape} and what follows")
                break
            report.add(row := attempt(shape, options))
            print(line(row), flush=True)
    else:
        print("\n".join(map(line, report.rows)))
    for what, name, kind in (("the same layer compiled again", "again", ""), ("fp8fx, left in bf16", "fp8fx", "high_precision")):
        found = [row[f"{name}_speed_up"] for row in report.rows if row.get(f"{name}_speed_up") and kind in row["decision"]]
        if found:
            print(f"\n{what}, over bf16: {min(found):.3f} to {max(found):.3f}, median {statistics.median(found):.3f}")
    print("\nthe lowest:")
    for row in sorted(report.rows, key=lambda row: row.get("fp8fx_speed_up") or 0)[:5]:
        print(line(row))
    return report.finish(bars(report.rows), draw)


if __name__ == "__main__":
    sys.exit(main())
