"""Whose kernel *lower* takes, and *annotate* prices, where both have a product: torch's (cuBLASLt), but for two kinds.

Precise with a short K: from h200.json, `tensor_precise` over `own_precise`: for K of 128 to 512 ours is 1.0 to 1.6 times as fast, beyond
that torch's up to 1.2 times. `row_precise` over `own_precise` says 1.0 to 1.7 up to 2,048; ours with scales by rows, whose end reads two
more, has no column.

Few rows, with scales by rows: a product reads W once, and on an H200 torch's takes 1.2 to 1.7 times as long as ours, which takes as long as
torch's with one scale, within 12% (`python tests/benchmarks/gemm.py --few-rows`).
"""

from __future__ import annotations

import math

LEAST, MOST = 128, {"tensor": 512, "row": 2048}  # of K
TILES = 66  # of C [128, 256], half as many as multiprocessors
FEW = 16  # rows


def own_is_faster(m: int, n: int, k: int, scales: str, accumulate: str) -> bool:
    """Of C [m, n], contracting k, with `tensor` or `row` scales, `fast` or `precise`, on a Hopper GPU."""
    if accumulate == "fast":
        return scales == "row" and m <= FEW
    return LEAST <= k <= MOST[scales] and m > 64 and n >= 256 and math.ceil(m / 128) * math.ceil(n / 256) >= TILES
