"""Whose products run the GEMMs of a linear layer after *lower*, in the words that *annotate* writes for the plan.

The operators choose when they run, by what they are given: `fp8fx.ops.inductor.torch_has`, `fp8fx.ops.cuda_blocks.lies_right`. Here these
are asked the same of tensors that have the shapes and types and hold nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fp8fx.formats import get
from fp8fx.ops.cuda_blocks import known_to_torch, lies_right
from fp8fx.ops.inductor import torch_has
from fp8fx.ops.rounded_mm import rounds_in_place
from fp8fx.ops.scaled_mm import ScaledMM
from fp8fx.spec import GEMMS, SiteSpec, TensorSpec

CUBLAS, OURS, HIGH = "cuBLASLt", "fp8fx's kernels", "high precision"


@functools.lru_cache(maxsize=4096)
def products(
    size: tuple[int, int, int],
    spec: SiteSpec,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    bias: torch.dtype | None,
    trains: bool,
    hopper: bool,
) -> str:
    """`products by cuBLASLt`, or where they differ `output by ..., grad_weight by ...`.

    size: M, K, N of X [M, K] by W [N, K]. dtypes: of Y, X and W, which their gradients have too. bias: its dtype.
    """
    (m, k, n), x, w, dy = size, spec.input, spec.weight, spec.grad_output
    # C = A B^T with A [rows, contracted], B [columns, contracted]
    operands = {"output": (m, n, k, x, w), "grad_input": (m, k, n, dy, w), "grad_weight": (n, k, m, dy, x)}
    found: dict[str, list[str]] = {}
    for i, gemm in enumerate(GEMMS if trains else GEMMS[:1]):
        rows, columns, contracted, a, b = operands[gemm]
        rounding: TensorSpec | None = getattr(spec, gemm)
        if gemm not in spec.gemms or a is None or b is None:
            who = HIGH
        elif rounding is not None and rounds_in_place(rounding):
            who = OURS
        else:
            wanted = torch.float32 if rounding is not None else dtypes[i]
            made = _empty((rows, columns, contracted), (a, b), wanted, bias if gemm == "output" else None, spec.accumulate[i])
            who = CUBLAS if _by_torch(made, hopper) else OURS
        found.setdefault(who, []).append(gemm)
    if len(found) == 1:
        return f"products by {next(iter(found))}"
    return ", ".join(f"{' and '.join(gemms)} by {who}" for who, gemms in found.items())


def _empty(
    size: tuple[int, int, int], sides: tuple[TensorSpec, TensorSpec], dtype: torch.dtype, bias: torch.dtype | None, accumulate: str
) -> ScaledMM:
    """The product C [M, N] = A [M, K] B [N, K]^T of tensors without storage."""
    m, n, k = size

    def side(spec: TensorSpec, lines: int) -> tuple[Tensor, Tensor, str, list[int]]:
        codes = torch.empty(lines, k, dtype=get(spec.format).torch_dtype, device="meta")
        shape, block = list[int](), list[int]()
        if isinstance(spec.granularity, tuple):
            block = sorted(spec.granularity)  # those of one row run along the contraction, whichever that is
            shape = [-(-lines // block[0]), -(-k // block[1])]
        elif spec.granularity != "tensor":
            shape = [lines, 1]
        return codes, torch.empty(shape, device="meta"), spec.format, block

    (a, scale_a, format_a, block_a), (b, scale_b, format_b, block_b) = side(sides[0], m), side(sides[1], n)
    scale_b = scale_b.mT if scale_b.dim() else scale_b
    added = None if bias is None else torch.empty(n, dtype=bias, device="meta")
    return ScaledMM(a, scale_a, format_a, block_a, b.mT, scale_b, format_b, block_b[::-1], added, dtype, accumulate)


def _by_torch(mm: ScaledMM, hopper: bool) -> bool:
    if mm.block_a or mm.block_b:
        return hopper and lies_right(mm) and known_to_torch()
    return torch_has(mm.a, mm.scale_a, mm.b, mm.scale_b, mm.bias, mm.dtype, False, mm.accumulate, hopper)
