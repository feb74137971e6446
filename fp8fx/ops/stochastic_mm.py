"""stochastic_mm: `scaled_mm` under an arithmetic whose products and sums are rounded stochastically: a gradient's GEMM.

    stochastic_mm(a [..., M, K], b [..., K, N], ..., rng, site, role)      the arguments of `scaled_mm`, and what its random words depend on

Forward operators have `rng` and `site` themselves and call the reference. There is no kernel: on a GPU the tiles run in torch.
"""

from __future__ import annotations

from fp8fx.ops.arguments import signature
from fp8fx.ops.library import define
from fp8fx.ops.scaled_mm import Draws, ScaledMM, scaled_mm_fake, scaled_mm_reference

stochastic_mm = define(
    f"stochastic_mm({signature(ScaledMM, Draws)}) -> Tensor",
    scaled_mm_reference,
    lambda *args: scaled_mm_fake(*args[: len(ScaledMM._fields)]),
)
