"""quantize, dequantize and their relatives: the operators that change a tensor's precision.

    quantize(x, spec)               -> q, scale, amax          x ~ decode(q) * scale; outside autograd
    dequantize(anchor, q, scale)    -> decode(q) * scale       gradient: identity to `anchor`, the tensor that was quantized
    round_values(x, spec)           -> decode(q) * scale, amax in one step and outside autograd: gradients that a role rounds
    round_gradient(x, spec)         -> x                       rounds the gradient that passes through it
    anchor(x, dtype)                -> zeros, stride 0         stands for a tensor that is only needed for its gradient
    meter_row(grad, q, amax...)     -> row [STATISTICS]        what one backward measured

The scale of a role with delayed scaling is an argument, computed from earlier steps; every other scale is computed here.

Quantize is not differentiable: an FP8 tensor as an autograd edge would have its gradient cast to FP8. What carries the
gradient is the high-precision *anchor*.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fp8fx import formats, numerics
from fp8fx.ops import observe
from fp8fx.ops.library import define
from fp8fx.spec import TensorSpec


def as_matrix(x: Tensor) -> Tensor:
    """[..., K] as [prod(...), K]. The number of rows is written out: where a size is 0, -1 could be any number."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


GRADIENTS = ("grad_output", "grad_input", "grad_weight")
STATISTICS = 5  # columns of a meter row: amax of each of GRADIENTS, non-zero elements of grad_output, those quantized to zero
UNMEASURED = -1.0  # in place of an amax that nobody measured


def quantize_reference(
    x: Tensor,
    spec: str,
    dims: list[int],
    rng: Tensor | None = None,
    site: str = "",
    role: str = "",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float32 scale (the dequantization multiplier) and float32 amax of `x`.

    `dims`: the dimensions that a GEMM will contract, over which a `row` scale is shared. `rng`: int64 [seed, step, call],
    read by stochastic rounding with the key hash(site, role). `scale`: float32 (), for delayed scaling; the scale returned is a copy.
    """
    parsed = TensorSpec.parse(spec)
    bits = _random_bits(x, parsed, rng, site, role)
    q, used, amax = numerics.quantize_tensor(x, parsed, tuple(dims), random_bits=bits, scale=scale)
    if observe.OBSERVERS:
        observe.quantized(site, role, x, q, used, parsed)
    return q.contiguous(), used.clone() if used is scale else used, amax


def _random_bits(x: Tensor, spec: TensorSpec, rng: Tensor | None, site: str, role: str) -> Tensor | None:
    if not spec.stochastic:
        return None
    if rng is None:
        raise ValueError(f"stochastic rounding at {site or 'a quantize node'} ({role}) needs the rng input [seed, step, call]")
    return numerics.philox_bits(x.shape, rng[0], numerics.producer_key(site, role), rng[1], rng[2], x.device)


def quantize_fake(
    x: Tensor,
    spec: str,
    dims: list[int],
    rng: Tensor | None = None,
    site: str = "",
    role: str = "",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = TensorSpec.parse(spec)
    dtype = formats.get(parsed.format).torch_dtype or torch.uint8
    q = x.new_empty(x.shape, dtype=dtype)
    used, amax = (x.new_empty(_scale_shape(x, parsed, dims, of_amax=of_amax), dtype=torch.float32) for of_amax in (False, True))
    return q, used, amax


def _scale_shape(x: Tensor, spec: TensorSpec, dims: list[int], of_amax: bool) -> list[Any]:
    if spec.granularity == "tensor" or (spec.scaling == "none" and not of_amax):
        return []
    block = spec.granularity
    if isinstance(block, str):  # row
        contracted = {d % x.dim() for d in dims}
        return [1 if i in contracted else size for i, size in enumerate(x.shape)]
    rows, columns = block
    return [*x.shape[:-2], (x.shape[-2] + rows - 1) // rows, (x.shape[-1] + columns - 1) // columns]


quantize = define(
    "quantize(Tensor x, str spec, int[] dims, Tensor? rng=None, str site='', str role='', Tensor? scale=None)"
    " -> (Tensor q, Tensor scale, Tensor amax)",
    quantize_reference,
    quantize_fake,
)


def dequantize_reference(anchor: Tensor, q: Tensor, scale: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    parsed = TensorSpec.parse(spec)
    values = numerics.dequantize_tensor(q, scale, parsed.format, parsed.granularity, dtype)
    return values.contiguous(memory_format=suggest_memory_format(anchor))  # a convolution's output keeps channels last


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grad.to(ctx.dtype), None, None, None, None


dequantize = define(
    "dequantize(Tensor anchor, Tensor q, Tensor scale, str spec, ScalarType dtype) -> Tensor",
    dequantize_reference,
    lambda anchor, q, scale, spec, dtype: q.new_empty(q.shape, dtype=dtype).contiguous(memory_format=suggest_memory_format(anchor)),
    setup_context=_dequantize_setup,
    backward=_dequantize_backward,
    twice=True,
)


def anchor_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A zero of x's shape with stride 0, which nobody reads: it carries the gradient to `x`, cast from `dtype`."""
    return torch.zeros((), dtype=dtype, device=x.device).expand(x.shape)


anchor = define(
    "anchor(Tensor x, ScalarType dtype) -> Tensor",
    anchor_reference,
    anchor_reference,
    setup_context=_dequantize_setup,
    backward=lambda ctx, grad: (grad.to(ctx.dtype), None),
    twice=True,
)


def round_reference(x: Tensor, spec: str, rng: Tensor | None, site: str, role: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x` rounded, in its own dtype, and the float32 () largest amax."""
    parsed = TensorSpec.parse(spec)
    q, used, amax = quantize_reference(x, spec, [-1], rng, site, role, scale)
    return numerics.dequantize_tensor(q, used, parsed.format, parsed.granularity, x.dtype), largest(amax)


def largest(amax: Tensor) -> Tensor:
    """The largest of the amax values of rows or blocks; 0 of none. Never an alias of its argument."""
    if amax.dim() == 0:
        return amax.clone()
    return amax.max() if amax.numel() else amax.new_zeros(())


round_values = define(
    "round_values(Tensor x, str spec, Tensor? rng, str site, str role, Tensor? scale=None) -> (Tensor values, Tensor amax)",
    round_reference,
    lambda x, *rest: (torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty((), dtype=torch.float32)),
)


def meter_row_reference(
    x: Tensor, q: Tensor | None, spec: str, grad_output: Tensor | None, grad_input: Tensor | None, grad_weight: Tensor | None
) -> Tensor:
    """float32 [STATISTICS]: the amax of each gradient role, UNMEASURED where it is None, then the counts of `x` with codes `q`."""
    amax = [x.new_full((), UNMEASURED, dtype=torch.float32) if a is None else largest(a) for a in (grad_output, grad_input, grad_weight)]
    counts = x.new_zeros((2,), dtype=torch.float32) if q is None else _underflow(x, q, spec)
    return torch.cat([torch.stack(amax), counts])


def _underflow(x: Tensor, q: Tensor, spec: str) -> Tensor:
    """float32 [2] of one quantized gradient `x` with codes `q`: its non-zero elements, and those of them that became zero."""
    fast = q.dtype in (torch.float8_e5m2, torch.float8_e4m3fn)  # both have zero codes 0x00 and 0x80 only
    zero = (q.view(torch.uint8) & 0x7F) == 0 if fast else numerics.decode(q, TensorSpec.parse(spec).format) == 0
    nonzero = x != 0
    return torch.stack([torch.count_nonzero(nonzero), torch.count_nonzero(nonzero & zero)]).float()


meter_row = define(
    "meter_row(Tensor x, Tensor? q, str spec, Tensor? grad_output, Tensor? grad_input, Tensor? grad_weight) -> Tensor",
    meter_row_reference,
    lambda x, *rest: x.new_empty((STATISTICS,), dtype=torch.float32),
)


def _round_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.spec, rng, ctx.site, ctx.role = inputs
    ctx.save_for_backward(rng)


def _round_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    (rng,) = ctx.saved_tensors
    return round_values(grad.contiguous(), ctx.spec, rng, ctx.site, ctx.role)[0], None, None, None, None


round_gradient = define(
    "round_gradient(Tensor x, str spec, Tensor? rng, str site, str role) -> Tensor",
    lambda x, spec, rng, site, role: x.clone(),
    lambda x, spec, rng, site, role: torch.empty_like(x),
    setup_context=_round_gradient_setup,
    backward=_round_gradient_backward,
)
