"""Tile sizes of the memory-bound kernels: GB/s of each candidate beside the one that ships, in the sizes of a Llama block's step.

    python tests/benchmarks/tile_sizes.py [--json figures.json] [--cases cast* amax*] [--workers 8]

No bars: what this prints is where the constants of fp8fx/kernels come from. Each byte that must move is counted once. Kernels are
compiled first, by several processes; then a case's candidates take turns inside CUDA graphs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from benchmark_report import Report, Row, device_for, error_text, need_triton, parser, refuse
from gpu_timing import interleaved
from torch import Tensor

if __name__ == "__main__":
    need_triton()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for --tiny; Triton reads it when a kernel is defined

from fp8fx.kernels import activation_amax, activation_cast, amax, cast
from fp8fx.kernels.rounding import Rounding

Tile = tuple[int, int, int]  # BLOCK_M, BLOCK_K, num_warps
BOTH: tuple[Tile, ...] = (
    *((64, 128, 4), (32, 128, 4), (64, 64, 4), (64, 64, 2), (32, 64, 2), (128, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)),
    *((32, 256, 4), (32, 256, 8), (16, 128, 2)),
)
FLAT: tuple[Tile, ...] = ((4, 4096, 8), (2, 4096, 8), (2, 4096, 4), (1, 4096, 4), (1, 4096, 8), (1, 2048, 4), (4, 4096, 16))
FORWARD: tuple[Tile, ...] = ((32, 128, 4), (32, 64, 4), (32, 64, 2), (64, 64, 4), (64, 128, 8), (32, 128, 8), (16, 128, 4), (64, 32, 4))
BACKWARD: tuple[Tile, ...] = (
    *((32, 64, 4), (32, 64, 2), (32, 32, 2), (16, 64, 2), (64, 32, 4), (64, 64, 8), (32, 128, 8), (16, 128, 4), (64, 64, 4)),
    *((32, 32, 1), (32, 32, 4)),
)
MEASURE: tuple[Tile, ...] = ((16, 128, 4), (32, 128, 4), (8, 128, 4), (16, 128, 8), (8, 128, 2), (16, 64, 4), (8, 256, 4), (4, 512, 4))


@dataclass(frozen=True)
class Case:
    """A call of a launcher, bytes that it moves per element, and the constant that holds its tile."""

    call: Callable[[Tensor], Any]
    bytes: float
    tiles: tuple[Tile, ...]
    module: Any
    constant: str
    key: str | None = None
    shapes: tuple[tuple[int, int], ...] = ((8192, 4096),)

    @contextlib.contextmanager
    def using(self, tile: Tile) -> Iterator[None]:
        shipped = getattr(self.module, self.constant)
        setattr(self.module, self.constant, tile if self.key is None else {**shipped, self.key: tile})
        try:
            yield
        finally:
            setattr(self.module, self.constant, shipped)

    @property
    def shipped(self) -> Tile:
        found: Any = getattr(self.module, self.constant)
        return found if self.key is None else found[self.key]  # type: ignore[no-any-return]


def cases(device: str) -> dict[str, Case]:
    scale, records = torch.tensor(0.01, device=device), torch.zeros(2, 4, device=device)
    how = Rounding("stochastic", rng=torch.tensor([1, 2, 3], device=device), key=7)
    others: dict[tuple[torch.Size, int], Tensor] = {}
    totals: dict[int, Tensor] = {}

    def other(x: Tensor, number: int) -> Tensor:
        """A further tensor like x, the same for every call."""
        key = x.shape, number
        if key not in others:
            others[key] = torch.randn_like(x)
        return others[key]

    def both(x: Tensor, **more: Any) -> Any:
        return cast.cast(x, "e5m2", scale, layout="both", record=records[0], **more)

    def swiglu(x: Tensor) -> Any:
        return activation_cast.activation_cast(x, other(x, 0), "silu", "e4m3fn", scale, record=records[0])

    def backward(x: Tensor, given: Tensor | None, **more: Any) -> Any:
        return activation_cast.activation_backward_cast(x, other(x, 0), other(x, 1), "silu", "e5m2", given, given, **more)

    def backward_counted(x: Tensor) -> Any:
        return backward(x, scale, record=records[0], record_u=records[1], counts=True)

    def gelu_backward(x: Tensor) -> Any:
        sums = totals.setdefault(x.shape[-1], torch.zeros(x.shape[-1], device=device))
        return activation_cast.activation_backward_cast(
            x, other(x, 0), None, "gelu_tanh", "e5m2", scale, record=records[0], counts=True, bias_grad=sums
        )

    def stochastic(x: Tensor) -> Any:
        return cast.cast(x, "e5m2", None, layout="both", how=how)

    twice, counted, turned, flat = ((cast, "_CONFIGS", key) for key in ("both", "small", "transposed", "flat"))
    weights, wide = ((14336, 4096), (4096, 4096)), ((8192, 14336),)
    return {
        "cast both, counts": Case(lambda x: both(x, counts=True), 4, BOTH, *counted, ((8192, 4096), (8192, 1024), (2048, 4096))),
        "cast both": Case(both, 4, BOTH, *twice),
        "cast both, stochastic": Case(stochastic, 4, BOTH, *twice),
        "cast transposed": Case(lambda x: cast.cast(x, "e4m3fn", scale, layout="transposed"), 3, BOTH, *turned, weights),
        "cast rows": Case(lambda x: cast.cast(x, "e4m3fn", scale, record=records[0]), 3, FLAT, *flat, weights),
        "cast rows, current": Case(lambda x: cast.cast_current(x, "e4m3fn"), 5, FLAT, *flat, weights),
        "cast both, current": Case(lambda x: cast.cast_current(x, "e4m3fn", layout="both"), 6, BOTH, *twice),
        "amax parts": Case(amax.amax_parts, 2, FLAT, amax, "_PARTS_FLAT", None, weights),
        "amax rows and columns": Case(lambda x: amax.amax_each(x, ("row", "column")), 2, BOTH, amax, "_AXES", None, weights),
        "cast rows and columns": Case(
            lambda x: cast.cast_current(x, "e4m3fn", "row", "column", "both", record=records[0]), 6, BOTH, cast, "_CONFIGS", "axes"
        ),
        "SwiGLU": Case(swiglu, 6, FORWARD, activation_cast, "_FORWARD", None, wide),
        "SwiGLU backward": Case(backward_counted, 10, BACKWARD, activation_cast, "_BACKWARD", None, wide),
        "SwiGLU backward, stochastic": Case(lambda x: backward(x, None, how=how), 10, BACKWARD, activation_cast, "_BACKWARD", None, wide),
        "GELU": Case(
            lambda x: activation_cast.activation_cast(x, None, "gelu_tanh", "e4m3fn", scale, record=records[0]),
            4, FORWARD, activation_cast, "_FORWARD", None, wide,
        ),
        "GELU backward, bias": Case(gelu_backward, 6, BACKWARD, activation_cast, "_BACKWARD", None, wide),
        "SwiGLU amax": Case(
            lambda x: activation_amax.activation_amax(x, other(x, 0), "silu"), 4, MEASURE, activation_amax, "_FORWARD", None, wide
        ),
        "SwiGLU backward amax": Case(
            lambda x: activation_amax.activation_backward_amax(x, other(x, 0), other(x, 1), "silu"),
            6, MEASURE, activation_amax, "_BACKWARD", None, wide,
        ),
    }  # fmt: skip


def inputs(shape: tuple[int, int], device: str, count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(count)]


def compile_some(device: str, wanted: list[tuple[str, int]]) -> None:
    """One process's share: launch each once, so that it lies in Triton's cache. What fails will fail again, where it is shown."""
    made = cases(device)
    for name, i in wanted:
        case = made[name]
        with contextlib.suppress(Exception), case.using(case.tiles[i]):
            for shape in case.shapes:
                case.call(inputs(shape, device, 1)[0])


def measure(name: str, case: Case, options: Any) -> Iterator[Row]:
    for shape in ((64, 128),) if options.tiny else case.shapes:
        xs, row = inputs(shape, options.device, 1 if options.tiny else 4), {"case": name, "m": shape[0], "k": shape[1]}
        calls, errors = {}, {}
        for tile in case.tiles[:2] if options.tiny else case.tiles:

            def call(x: Tensor, tile: Tile = tile) -> None:
                with case.using(tile):
                    case.call(x)

            try:
                call(xs[0])
                calls[str(tile)] = [lambda x=x, call=call: call(x) for x in xs]
            except Exception as error:
                errors[str(tile)] = error_text(error)
        seconds = interleaved(calls, options.rounds, 0.004)
        gbs = {tile: xs[0].numel() * case.bytes / time / 1e9 for tile, time in seconds.items()}
        yield row | {"gbs": gbs, "errors": errors, "shipped": str(case.shipped)}


def line(row: Row) -> str:
    ranked = sorted(row["gbs"].items(), key=lambda item: -item[1])
    figures = "  ".join(f"{tile.replace(' ', '')} {rate:.0f}" for tile, rate in ranked[:6])
    own = row["gbs"].get(row["shipped"])
    return f"{row['case']:<28}{row['m']:>6} x {row['k']:<6} ships {row['shipped'].replace(' ', '')} {own or 0:.0f} GB/s | {figures}"


def draw(figure: Any, rows: list[Row]) -> None:
    """What ships (blue) on the best candidate (grey), GB/s."""
    names = [f"{row['case']}, {row['m']} x {row['k']}" for row in rows]
    axes = figure.add_subplot()
    figure.set_size_inches(8, 1 + 0.28 * max(len(rows), 4))
    axes.barh(names, [max(row["gbs"].values()) for row in rows], color="#999999")
    axes.barh(names, [row["gbs"].get(row["shipped"], 0) for row in rows], height=0.5, color="#2b6cb0")
    axes.invert_yaxis()
    axes.set_xlabel("GB/s: the tile that ships (blue), the best candidate (grey)")


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--cases", nargs="+", default=["*"], help="with wildcards")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--workers", type=int, default=8)
    options = made.parse_args(argv)
    options.device = device_for(options, made)
    report = Report("tile_sizes", options, options.device, ("case", "m", "k"))
    for row in report.rows:
        print(line(row))
    if report.measures:
        run(options, report)
    return report.finish([], draw)


def run(options: Any, report: Report) -> None:
    table = {name: case for name, case in cases(options.device).items() if any(fnmatch.fnmatch(name, p) for p in options.cases)}
    if not table:
        refuse(f"argument --cases: no case {' '.join(options.cases)}; there are {'; '.join(cases(options.device))}")
    if options.device == "cuda":
        wanted = [(name, i) for name, case in table.items() for i in range(len(case.tiles))]
        shares = [wanted[i :: options.workers] for i in range(options.workers)]
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            list(pool.map(compile_some, [options.device] * len(shares), shares))
    for name, case in table.items():
        for row in measure(name, case, options):
            report.add(row)
            print(line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
