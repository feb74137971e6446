"""rounded_mm: a GEMM whose result is rounded once from its fp32 sums to an FP8 format's grid, and handed on in high precision.

    rounded_mm(a [..., M, K], b [..., K, N], spec) = round_values(scaled_mm(a, b) in fp32, spec), in `dtype`

`spec` has no scale. It is what a role does to an output or a gradient: the random bits are those of the tensor [..., M, N] under `site`
and `role`. On a GPU it is the last step of the product's own kernel, so that the fp32 sums are never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8fx.ops.library import define
from fp8fx.ops.quantize import round_reference
from fp8fx.ops.scaled_mm import scaled_mm_fake, scaled_mm_reference
from fp8fx.spec import TensorSpec


def rounds_in_place(spec: TensorSpec | None) -> bool:
    """A product can round to `spec` as it ends: nothing must be known of the whole tensor first."""
    return spec is not None and spec.scaling == "none"


def rounded_mm_reference(
    a: Tensor,
    scale_a: Tensor | None,
    format_a: str,
    block_a: list[int],
    b: Tensor,
    scale_b: Tensor | None,
    format_b: str,
    block_b: list[int],
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulate: str,
    spec: str,
    rng: Tensor | None,
    site: str,
    role: str,
) -> Tensor:
    """The arguments of `scaled_mm`, `dtype` being the result's, then the rounding's."""
    sums = scaled_mm_reference(
        a, scale_a, format_a, block_a, b, scale_b, format_b, block_b, bias, torch.float32, accumulate, rng, site, role
    )
    return round_reference(sums, spec, rng, site, role)[0].to(dtype)


def rounded_mm_fake(*args: object) -> Tensor:
    return scaled_mm_fake(*args[:11])  # type: ignore[arg-type]


rounded_mm = define(
    "rounded_mm(Tensor a, Tensor? scale_a, str format_a, int[] block_a, Tensor b, Tensor? scale_b, str format_b, int[] block_b,"
    " Tensor? bias, ScalarType dtype, str accumulate, str spec, Tensor? rng, str site, str role) -> Tensor",
    rounded_mm_reference,
    rounded_mm_fake,
)
