"""stochastic_mm: `scaled_mm` under an arithmetic whose products and sums are rounded stochastically: a gradient's GEMM.

    stochastic_mm(a [..., M, K], b [..., K, N], ..., rng, site, role)      the arguments of `scaled_mm`, and what its random words depend on

Forward operators have `rng` and `site` themselves and call the reference. There is no kernel: on a GPU the tiles run in torch.
"""

from __future__ import annotations

from fp8fx.ops.library import define
from fp8fx.ops.scaled_mm import scaled_mm_fake, scaled_mm_reference

stochastic_mm = define(
    "stochastic_mm(Tensor a, Tensor? scale_a, str format_a, int[] block_a, Tensor b, Tensor? scale_b, str format_b, int[] block_b,"
    " Tensor? bias, ScalarType dtype, str accumulate, Tensor? rng, str site, str role) -> Tensor",
    scaled_mm_reference,
    lambda *args: scaled_mm_fake(*args[:11]),
)
