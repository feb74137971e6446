"""The memory-bound kernels against the bandwidth of a bf16 copy, in GB/s, each byte that must move counted once.

    python tests/benchmarks/casts.py [--json figures.json] [--rounds 9]

Needs a Hopper GPU. bf16 input, e4m3fn output. Buffers rotate where one set would stay in the L2 cache. Bars, at 8192 x 14336: cast,
transpose and amax in one pass at least 0.85 of the copy, SwiGLU to FP8 with transpose and amax at least 0.90.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import conditions, finish, interleaved
from torch import Tensor

from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.amax import amax, amax_each
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.delayed import delayed_update
from fp8fx.kernels.norm_cast import norm_cast

SHAPES = [(8192, 14336), (8192, 4096), (16384, 8192)]
COPY, BAR, SWIGLU = "copy", "cast+transpose+amax", "SwiGLU to FP8"


def kernels() -> dict[str, tuple[Callable[[Tensor], Any], float]]:
    """name -> (call on x, bytes that must move per element)."""
    scale, largest = torch.tensor(0.01, device="cuda"), torch.zeros((), device="cuda")
    largest_u, others = torch.zeros((), device="cuda"), dict[int, Tensor]()

    def partner(x: Tensor) -> Tensor:
        """A second tensor like x, the same for every call."""
        if x.data_ptr() not in others:
            others[x.data_ptr()] = torch.randn_like(x)
        return others[x.data_ptr()]

    how = Rounding("stochastic", rng=torch.tensor([1, 2, 3], device="cuda"), key=7)
    return {
        COPY: (torch.clone, 4),
        "amax": (amax, 2),
        "amax row+column": (lambda x: amax_each(x, ("row", "column")), 2),
        "cast": (lambda x: cast(x, "e4m3fn", scale), 3),
        "cast+amax": (lambda x: cast(x, "e4m3fn", scale, amax=largest), 3),
        "cast+transpose": (lambda x: cast(x, "e4m3fn", scale, layout="both"), 4),
        BAR: (lambda x: cast(x, "e4m3fn", scale, layout="both", amax=largest), 4),
        "the same, e5m2": (lambda x: cast(x, "e5m2", scale, layout="both", amax=largest), 4),
        "the same, stochastic": (lambda x: cast(x, "e5m2", scale, layout="both", how=how, amax=largest), 4),
        "transpose only": (lambda x: cast(x, "e4m3fn", scale, layout="transposed"), 3),
        "current, both": (lambda x: cast_current(x, "e4m3fn", layout="both"), 6),
        "current, row+column": (lambda x: cast_current(x, "e4m3fn", "row", "column", "both"), 6),
        "blocks 1x128": (lambda x: cast_block(x, "e4m3fn"), 3),
        "blocks 1x128, both": (lambda x: cast_block(x, "e4m3fn", layout="both"), 4),
        "blocks 128x128, both": (lambda x: cast_block(x, "e4m3fn", (128, 128), layout="both"), 4),
        SWIGLU: (lambda x: activation_cast(x, partner(x), "silu", "e4m3fn", scale, amax=largest), 6),
        "RMSNorm to FP8": (lambda x: norm_cast(x, None, None, "e4m3fn", "rms", 1e-6, scale, amax=largest), 4),
        "gelu to FP8": (lambda x: activation_cast(x, None, "gelu", "e4m3fn", scale, amax=largest), 4),
        "SwiGLU backward": (
            lambda x: activation_backward_cast(x, partner(x), x, "silu", "e5m2", scale, scale, amax=largest, amax_u=largest_u),
            8,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Casts against copy bandwidth.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    print(conditions())
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        xs = [torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(3)]
        table = kernels()
        seconds = interleaved({name: [lambda x=x, call=call: call(x) for x in xs] for name, (call, _) in table.items()}, options.rounds)
        rates = {name: xs[0].numel() * table[name][1] / time / 1e9 for name, time in seconds.items()}
        rows.append({"shape": shape, "GB/s": rates})
        torch.cuda.empty_cache()
    print(f"{'GB/s':>22}" + "".join(f"{f'{m} x {k}':>18}" for m, k in SHAPES))
    for name in rows[0]["GB/s"]:
        print(f"{name:>22}" + "".join(f"{row['GB/s'][name]:10.0f} {row['GB/s'][name] / row['GB/s'][COPY]:6.2f} " for row in rows))
    slots = [torch.rand(512, 16, device="cuda"), *(torch.rand(512, device="cuda") + 0.5 for _ in range(3))]
    update = interleaved({"update": [lambda: delayed_update(*slots)] * 20}, options.rounds)["update"]
    print(f"delayed update of 512 slots with a history of 16: {update * 1e6:.1f} us")
    figures = rows[0]["GB/s"]
    bars = [(f"{name} over copy, 8192 x 14336", figures[name] / figures[COPY], least) for name, least in ((BAR, 0.85), (SWIGLU, 0.90))]
    return finish(bars, rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
