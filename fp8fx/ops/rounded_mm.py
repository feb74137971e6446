"""rounded_mm: a GEMM whose result is rounded once from its fp32 sums to an FP8 format's grid, and handed on in high precision.

    rounded_mm(a [..., M, K], b [..., K, N], spec) = round_values(scaled_mm(a, b) in fp32, spec), in `dtype`

`spec` has no scale. It is what a role does to an output or a gradient: the random bits are those of the tensor [..., M, N] under `site`
and `role`. On a GPU it is the last step of the product's own kernel, so that the fp32 sums are never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8fx.ops.arguments import signature, takes
from fp8fx.ops.library import define
from fp8fx.ops.quantize import round_reference
from fp8fx.ops.scaled_mm import ScaledMM, scaled_mm_fake, scaled_mm_reference
from fp8fx.spec import TensorSpec


def rounds_in_place(spec: TensorSpec | None) -> bool:
    """A product can round to `spec` as it ends: nothing must be known of the whole tensor first."""
    return spec is not None and spec.scaling == "none"


class Ending(NamedTuple):
    """What `rounded_mm` takes beside the arguments of `scaled_mm`, of which `dtype` is then the result's: the rounding."""

    spec: str
    rng: Tensor | None
    site: str
    role: str


@takes(ScaledMM, Ending)
def rounded_mm_reference(mm: ScaledMM, ending: Ending) -> Tensor:
    sums = scaled_mm_reference(*mm._replace(dtype=torch.float32), ending.rng, ending.site, ending.role)
    return round_reference(sums, *ending)[0].to(mm.dtype)


@takes(ScaledMM, Ending)
def rounded_mm_fake(mm: ScaledMM, _: Ending) -> Tensor:
    return scaled_mm_fake(*mm)


rounded_mm = define(f"rounded_mm({signature(ScaledMM, Ending)}) -> Tensor", rounded_mm_reference, rounded_mm_fake)
