"""How the operators look to Inductor: products that cuBLASLt has become aten's own, which Inductor knows how to place and launch.

    linear(x, w, b, [q_x, s_x, ...], [q_w, s_w], ...)  =  aten._scaled_mm(q_x, q_w.T, s_x, s_w, b)
    scaled_mm(a, s_a, b, s_b)                          =  aten._scaled_mm(a, b, s_a, s_b)
    cast_current(x)                                    =  cast_amax(x, amax of rows, then of those)

An anchor that only carries a gradient is no longer an argument then, so that the tensor it stands for need not be written. What cuBLASLt
does not have becomes one of fp8fx's own products, which take no anchors either. These are decompositions: AOTAutograd applies them when it
writes its graphs, after autograd.

The amax of what Inductor computes itself, norms and sums of gradients, is found in the kernel that computes it: a pass over x less, 0.4 ms
of 25.0 in a step of two Llama blocks. Under current scaling of weights, and by rows or blocks, the project's own kernel measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx.costs.own import own_is_faster
from fp8fx.ops.casts import cast_amax, cast_current
from fp8fx.ops.linear import linear
from fp8fx.ops.operands import forward_operand
from fp8fx.ops.quantize import as_matrix
from fp8fx.ops.rounded_mm import rounded_mm
from fp8fx.ops.scaled_mm import scaled_mm
from fp8fx.spec import ACCUMULATORS, SiteSpec, TensorSpec

FORMATS = ("e4m3fn", "e5m2")


def torch_has(
    a: Tensor,
    scale_a: Tensor | None,
    b: Tensor,
    scale_b: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    blocks: bool,
    accumulate: str = "fast",
    hopper: bool | None = None,
) -> bool:
    """cuBLASLt takes this product as it lies, and is not the slower one. `a` [M, K], `b` [K, N]. hopper: None asks the device of `a`."""
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9):
        return False
    if blocks or scale_a is None or scale_b is None or a.dim() != 2 or b.dim() != 2 or not a.numel() or not b.numel():
        return False
    if a.element_size() != 1 or b.element_size() != 1 or a.dtype == b.dtype == torch.float8_e5m2 or dtype not in _OUTPUTS:
        return False
    if bias is not None and (bias.dtype != dtype or dtype == torch.float32):
        return False
    rows = scale_a.numel() != 1
    if rows != (scale_b.numel() != 1) or (rows and dtype != torch.bfloat16):
        return False
    if _ours(a, b.shape[1], "row" if rows else "tensor", accumulate, hopper):
        return False
    return a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0 and a.is_contiguous() and b.mT.is_contiguous()


def _ours(a: Tensor, n: Any, scales: str, accumulate: str, hopper: bool | None) -> bool:
    """The project's kernel is the faster one. Not asked of symbols, which would be tied to the answer."""
    sizes = (a.shape[0], n, a.shape[1])
    if hopper is None:
        hopper = not a.is_cuda or torch.cuda.get_device_capability(a.device)[0] == 9
    return hopper and all(isinstance(size, int) for size in sizes) and own_is_faster(*sizes, scales, accumulate)


_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def cut_by_batches(x: Tensor, block: tuple[int, ...]) -> bool:
    """Blocks of several rows of x [..., M, K] end where each matrix does: seen as one matrix, they would not lie on its grid of blocks."""
    return x.dim() > 2 and bool(block) and block[0] > 1 and x.shape[-2] % block[0] != 0


def _scaled_mm(
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
    accumulate: str = "precise",
) -> Any:
    plain = format_a in FORMATS and format_b in FORMATS and accumulate in ACCUMULATORS
    if not on_gpu(a) or not plain or not torch_has(a, scale_a, b, scale_b, bias, dtype, bool(block_a or block_b), accumulate):
        return NotImplemented
    if scale_a.numel() == 1:  # type: ignore[union-attr]
        # Inductor's lowering of this product loses the place of a scale () that lies inside of another tensor.
        scale_a, scale_b = scale_a.view(1, 1), scale_b.view(1, 1)  # type: ignore[union-attr]
    return torch.ops.aten._scaled_mm.default(a, b, scale_a, scale_b, bias, None, dtype, accumulate == "fast")


def _linear(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Any:
    _, _, rng, site, input_spec, weight_spec, backward, dtype = rest
    spec = SiteSpec.parse_backward(backward)
    if not on_gpu(x) or "output" not in spec.gemms or not input or not weight or spec.accumulate[0] not in ACCUMULATORS:
        return NotImplemented
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    if cut_by_batches(x, left.block):
        return NotImplemented
    scale = left.scale
    if scale is not None and scale.dim() > 2:
        scale = as_matrix(scale)
    operands: Any = (as_matrix(left.values), scale, left.format, list(left.block), *right.arguments(), b, dtype, spec.accumulate[0])
    y = scaled_mm(*operands) if spec.output is None else rounded_mm(*operands, spec.output.text, rng, site, "output")
    return y.view(*x.shape[:-1], y.shape[-1])


def _cast_current(x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, record: Tensor | None, layout: str) -> Any:
    parsed = TensorSpec.parse(spec)
    wide = x.dtype in (torch.bfloat16, torch.float32)  # what float32 holds, bfloat16 may round, but not to inf
    if not x.is_cuda or role == "weight" or parsed.granularity != "tensor" or not wide or x.dim() < 2 or not x.numel():
        return NotImplemented
    return *(found := cast_amax(x, row_amax(x), spec, rng, site, role, record, layout)), found[2].new_empty(0)


def row_amax(x: Tensor) -> Tensor:
    """float32 (), amax over the finite elements of `x`, by rows first.

    Rows' amax is kept in x's dtype: Inductor measures before it rounds x, and the largest of what is rounded is the largest rounded.
    """
    magnitude = x.abs()
    return torch.where(magnitude < math.inf, magnitude, 0.0).amax(-1).amax().float()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's own, and these."""
    from torch._inductor.decomposition import select_decomp_table

    ours: dict[Any, Callable[..., Any]] = {linear: _linear, scaled_mm: _scaled_mm, cast_current: _cast_current}
    for operator in ours:
        _fall_back(operator)
    return {**select_decomp_table(), **ours}


def _fall_back(operator: Any) -> None:
    """Where a decomposition says NotImplemented the operator is called as it is; Inductor would refuse one that has both."""
    from torch._inductor import lowering

    if operator in lowering.lowerings:
        return
    constraint = None
    if hasattr(lowering, "get_layout_constraint_tag"):
        constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(operator, with_default=True))
    lowering.make_fallback(operator, constraint, warn=False, override_decomp=True)  # type: ignore[no-untyped-call]
