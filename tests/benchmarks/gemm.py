"""scaled_mm against torch's own FP8 matrix product (cuBLASLt), in TFLOP/s, on the sizes of a Llama's linears.

    python tests/benchmarks/gemm.py [--json figures.json] [--rounds 9]

Needs a Hopper GPU. Random data, bf16 output, K-major operands. Columns: our kernel and torch's for one scale per tensor and one per row
and column, fast accumulation; ours with e5m2 x e5m2, which torch refuses; both with precise accumulation; ours with 1x128 and 128x128
blocks. Bars, each over all sizes: ours over torch's at least 0.97 (tensor, row), e5m2 x e5m2 over e4m3 x e4m3 at least 0.95.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Call, conditions, finish, interleaved
from torch import Tensor

from fp8fx.kernels.scaled_mm import scaled_mm

SHAPES = [
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
    (16384, 16384, 16384),
    (2048, 4096, 4096),
]
FAST = ("tensor", "torch tensor", "row", "torch row", "e5m2 x e5m2")  # what the bars compare takes turns among itself
OTHERS = ("precise", "torch precise", "blocks")
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(dtype)


def candidates(m: int, n: int, k: int) -> dict[str, Call]:
    a, b = codes(m, k, E4), codes(n, k, E4).t()
    a5, b5 = a.to(E5), b.t().to(E5).t()
    one = torch.tensor(0.5, device="cuda")
    rows, columns = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(1, n, device="cuda") + 0.5
    blocks_a, blocks_b = torch.rand(m, k // 128, device="cuda"), torch.rand(k // 128, n // 128, device="cuda")

    def torch_mm(scale_a: Tensor, scale_b: Tensor, fast: bool) -> Call:
        return lambda: torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        "tensor": lambda: scaled_mm(a, b, one, one),
        "torch tensor": torch_mm(one, one, True),
        "row": lambda: scaled_mm(a, b, rows, columns),
        "torch row": torch_mm(rows, columns, True),
        "e5m2 x e5m2": lambda: scaled_mm(a5, b5, one, one),
        "precise": lambda: scaled_mm(a, b, one, one, accumulate="precise"),
        "torch precise": torch_mm(one, one, False),
        "blocks": lambda: scaled_mm(a, b, blocks_a, blocks_b, block_a=(1, 128), block_b=(128, 128)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="scaled_mm against torch's own.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(conditions())
    for m, n, k in SHAPES:
        calls = candidates(m, n, k)
        repeats = max(1, round(2e12 / (m * n * k)))
        seconds: dict[str, float] = {}
        for group in (FAST, OTHERS):
            seconds |= interleaved({name: [calls[name]] * repeats for name in group}, options.rounds)
        if not rows:
            print(f"{'M, N, K':>20}" + "".join(f"{name:>14}" for name in seconds) + "   TFLOP/s")
        rates = {name: 2e-12 * m * n * k / time for name, time in seconds.items()}
        rows.append({"m": m, "n": n, "k": k, "tflops": rates})
        print(f"{f'{m}, {n}, {k}':>20}" + "".join(f"{rate:14.0f}" for rate in rates.values()), flush=True)
        torch.cuda.empty_cache()

    def worst(name: str, peer: str) -> float:
        return min(row["tflops"][name] / row["tflops"][peer] for row in rows)

    return finish(
        [
            ("tensor over torch, lowest", worst("tensor", "torch tensor"), 0.97),
            ("row over torch, lowest", worst("row", "torch row"), 0.97),
            ("e5m2 x e5m2 over e4m3 x e4m3, lowest", worst("e5m2 x e5m2", "tensor"), 0.95),
        ],
        rows,
        options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
