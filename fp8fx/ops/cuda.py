"""The operators' implementations on CUDA devices: kernels where there is one, the reference for the rest.

Registered by *lower* for the first graph that runs on such a device. An operator's meaning is its reference: codes, scales and amax
are equal bit for bit, products within the bound of another order of sums.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8fx.errors import FP8Warning
from fp8fx.kernels import scaled_mm
from fp8fx.kernels.launch import KernelCompileError
from fp8fx.kernels.replay import taped
from fp8fx.kernels.rounding import Rounding
from fp8fx.ops import linear as linear_op
from fp8fx.ops import quantize as quantize_op
from fp8fx.ops.arguments import takes
from fp8fx.ops.cuda_blocks import by_torch
from fp8fx.ops.cuda_casts import DTYPES, cast, cast_amax, cast_current, has_kernel, quantize, round_values, rounding_of
from fp8fx.ops.cuda_norms import norm_backward, norm_cast
from fp8fx.ops.inductor import FORMATS, cut_by_batches, torch_has
from fp8fx.ops.library import LIBRARY, REFERENCES, without_autocast
from fp8fx.ops.operands import forward_operand
from fp8fx.ops.quantize import as_matrix
from fp8fx.ops.rounded_mm import Ending, rounded_mm_reference, rounds_in_place
from fp8fx.ops.scaled_mm import ScaledMM, scaled_mm_reference
from fp8fx.spec import ACCUMULATORS, SiteSpec, TensorSpec

SAMPLED = 256  # rows of a gradient that the underflow counts look at: a share of them is enough for a warning


@functools.cache
def one(device: torch.device) -> Tensor:
    """The scale of what has none. It lives on, so the first call must not lie inside of a CUDA graph, whose memory it would be in."""
    return torch.ones((), device=device)


@takes(ScaledMM)
def scaled(mm: ScaledMM) -> Tensor:
    if mm.format_a not in FORMATS or mm.format_b not in FORMATS or mm.dtype not in DTYPES or mm.accumulate not in ACCUMULATORS:
        return scaled_mm_reference(*mm)
    one_a, one_b = (one(mm.a.device) if scale is None else scale for scale in (mm.scale_a, mm.scale_b))
    aligned = (mm.a.data_ptr() | mm.b.data_ptr()) % 16 == 0
    if aligned and torch_has(mm.a, one_a, mm.b, one_b, mm.bias, mm.dtype, bool(mm.block_a or mm.block_b), mm.accumulate):
        return torch._scaled_mm(mm.a, mm.b, one_a, one_b, mm.bias, None, mm.dtype, mm.accumulate == "fast")
    if not _has_blocks(mm.block_a, mm.block_b):
        return scaled_mm_reference(*mm)
    made = by_torch(mm) if mm.block_a and mm.block_b else None
    return _OWN_PRODUCT(*_own_arguments(mm), None, None)[0] if made is None else made


def _own_arguments(mm: ScaledMM) -> tuple[Any, ...]:
    """Without formats, which the codes have; the blocks as tuples, None where there are none."""
    blocks = tuple(mm.block_a) or None, tuple(mm.block_b) or None
    return mm.a, mm.scale_a, blocks[0], mm.b, mm.scale_b, blocks[1], mm.bias, mm.dtype, mm.accumulate


def _own_product(
    a: Tensor,
    scale_a: Tensor | None,
    block_a: Any,
    b: Tensor,
    scale_b: Tensor | None,
    block_b: Any,
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulate: str,
    round_to: str | None,
    rng: Tensor | None,
    rounding: str = "nearest_even",
    overflow: str = "saturate",
    key: int = 0,
) -> tuple[Tensor, ...]:
    """The project's own kernel; (y,)."""
    scale_a, scale_b = (one(a.device) if scale is None else scale for scale in (scale_a, scale_b))
    how = Rounding(rounding, overflow, rng, key)
    return (scaled_mm.scaled_mm(a, b, scale_a, scale_b, bias, dtype, accumulate, block_a, block_b, round_to=round_to, how=how),)


_OWN_PRODUCT = taped(_own_product)


def _has_blocks(block_a: list[int], block_b: list[int]) -> bool:
    along_k = [block[i] for block, i in ((block_a, 1), (block_b, 0)) if block]
    return not along_k or math.gcd(*along_k, 128) >= 32


@takes(ScaledMM, Ending)
def rounded(mm: ScaledMM, ending: Ending) -> Tensor:
    parsed = TensorSpec.parse(ending.spec)
    codes = mm.format_a in FORMATS and mm.format_b in FORMATS and mm.dtype in DTYPES and _has_blocks(mm.block_a, mm.block_b)
    if mm.accumulate not in ACCUMULATORS:
        return rounded_mm_reference(*mm, *ending)
    if not codes or not has_kernel(mm.a, parsed, (mm.a.dtype,)) or not rounds_in_place(parsed):
        sums = scaled(*mm._replace(dtype=torch.float32))
        return round_values(sums, *ending)[0].to(mm.dtype)
    how = rounding_of(parsed, *ending[1:])
    return _OWN_PRODUCT(*_own_arguments(mm), parsed.format, how.rng, how.rounding, how.overflow, how.key)[0]


def linear(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    input_spec, weight_spec, backward, dtype = rest[-4:]
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms or not input or not weight or spec.accumulate[0] not in ACCUMULATORS:
        return linear_op.linear_reference(x, w, b, input, weight, *rest)
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    if cut_by_batches(x, left.block):
        return linear_op.linear_reference(x, w, b, input, weight, *rest)
    scale = left.scale if x.dim() == 2 or left.scale is None or left.scale.dim() == 0 else left.scale.view(-1, left.scale.shape[-1])
    values, _, format, block = left.arguments()
    values = values if x.dim() == 2 else as_matrix(values)
    operands: Any = (values, scale, format, block, *right.arguments(), b, dtype, spec.accumulate[0])
    ending: Any = () if spec.output is None else (spec.output.text, rest[2], rest[3], "output")  # spec, rng, site, role
    y = rounded(*operands, *ending) if ending else scaled(*operands)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def meter_row(x: Tensor, q: Tensor | None, spec: str, *amax: Tensor | None) -> Tensor:
    """The counts come from evenly spaced rows: reading every gradient again would cost half as much as quantizing it."""
    if q is not None and x.dim() > 1 and x.shape[0] > SAMPLED:
        step = x.shape[0] // SAMPLED
        x, q = x[::step], q[::step]
    return quantize_op.meter_row_reference(x, q, spec, *amax)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "quantize": taped(quantize),
    "cast": taped(cast),
    "cast_current": taped(cast_current),
    "cast_amax": taped(cast_amax),
    "norm_cast": norm_cast,
    "norm_backward": taped(norm_backward),
    "scaled_mm": scaled,
    "rounded_mm": rounded,
    "round_values": taped(round_values),
    "linear": linear,
    "meter_row": meter_row,
}


KERNELS_ONLY = (  # nothing in them that an autocast region would change
    "cast",
    "cast_current",
    "cast_amax",
    "act_backward_cast",
    "act_backward_gate",
    "act_backward_up",
)


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and the operator's reference where a kernel of it does not compile: with a warning, and training goes on."""
    reference = without_autocast(REFERENCES[name])

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KernelCompileError as error:
            _warn(f"fp8fx::{name}: {error}")
        return reference(*args, **kwargs)

    return run


@functools.cache
def _warn(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, FP8Warning, stacklevel=3)


@functools.cache
def register() -> None:
    """For CUDA tensors these run in place of the references, from the first call of this on."""
    from fp8fx.ops import cuda_act

    for name, function in {**IMPLEMENTATIONS, **cuda_act.IMPLEMENTATIONS}.items():
        function = function if name in KERNELS_ONLY else without_autocast(function)
        LIBRARY.impl(name, guarded(name, function), "CUDA")
