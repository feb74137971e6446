"""conv: 1-d, 2-d and 3-d convolutions and their transposed forms, as `torch.convolution` takes them.

    conv(x, w, b, input, weight, meter, scales, rng, stride, padding, dilation, transposed, output_padding, groups,
         site, input_spec, weight_spec, backward, dtype) -> y

The products are those of the codes, in fp32, times the two scales. A scale per tensor factors out of all three sums. The weight may also
have one per output channel (transposed and with groups: per output channel of a group, the same for all groups), which factors out of
Y; in dX, which sums over the output channels, the dequantized weight takes the place of its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn.functional import unfold

from fp8fx.ops.library import define
from fp8fx.ops.linear import Saved
from fp8fx.ops.operands import Backward, Operand, backward_operand, forward_operand
from fp8fx.ops.scaled_mm import apply_scales, multiplication, operand
from fp8fx.spec import ACCUMULATORS, SiteSpec

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]  # stride .. groups, in the order of the schema


def conv_reference(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    input: list[Tensor],
    weight: list[Tensor],
    meter: Tensor | None,
    scales: Tensor | None,
    rng: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    site: str,
    input_spec: str,
    weight_spec: str,
    backward: str,
    dtype: torch.dtype,
) -> Tensor:
    geometry: Geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if "output" not in SiteSpec.parse_backward(backward).gemms:
        return _laid_out(torch.convolution(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype), *geometry), layout(x, w))
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec)
    accumulate = SiteSpec.parse_backward(backward).accumulate[0]
    if accumulate in ACCUMULATORS:
        result = torch.convolution(operand(left.values, left.format), operand(right.values, right.format), None, *geometry)
    else:
        multiply = multiplication(accumulate, right.format, left.format, rng, site)
        result = _unfolded(left, right, geometry, multiply)
    result = apply_scales(result, left.scale, _by_channel(right.scale, w.dim(), groups if transposed else 1))
    if b is not None:
        result = result + b.float().reshape(-1, *([1] * (w.dim() - 2)))
    return _laid_out(result.to(dtype), layout(x, w))


def _by_channel(scale: Tensor | None, dims: int, groups: int) -> Tensor | None:
    """Scales per output channel, as they lie in the weight, as [1, channels, 1, ...]; any other as it is."""
    if scale is None or scale.dim() == 0:
        return scale
    return scale.reshape(-1).repeat(groups).reshape(1, -1, *([1] * (dims - 2)))


def _unfolded(x: Operand, w: Operand, geometry: Geometry, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A 1-d or 2-d convolution as one product per image and group, [O / g, C / g k] by [C / g k, L]: for an arithmetic of its own."""
    stride, padding, dilation, _, _, groups = geometry
    values, weight = operand(x.values, x.format), operand(w.values, w.format)
    flat = weight.dim() == 3
    if flat:
        values, weight = values.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    kernels = weight.flatten(1).chunk(groups)
    sizes = zip(values.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]
    result = values.new_empty((values.shape[0], weight.shape[0], *size))
    for image, out in zip(values, result, strict=True):
        columns = unfold(image[None], tuple(weight.shape[2:]), tuple(dilation), tuple(padding), tuple(stride))[0].chunk(groups)
        out.copy_(torch.cat([multiply(k, c) for k, c in zip(kernels, columns, strict=True)]).view(out.shape))
    return result.squeeze(2) if flat else result


def _laid_out(y: Tensor, format: torch.memory_format) -> Tensor:
    """`y` with the very strides of `format`: where a size is 1, torch takes several strides for the same format."""
    made = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format)
    return y if y.stride() == made.stride() else made.copy_(y)


def layout(x: Tensor, w: Tensor) -> torch.memory_format:
    """The memory format torch's own convolution of `x` and `w` returns: channels last where either is, never for float64."""
    formats = {suggest_memory_format(t) for t in (x, w)} - {torch.contiguous_format}
    return torch.contiguous_format if not formats or torch.float64 in (x.dtype, w.dtype) else formats.pop()


def conv_fake(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    geometry = rest[3:9]
    shape = torch.convolution(x.to(w.dtype), w, None, *geometry).shape
    return torch.empty(shape, dtype=rest[-1], device=x.device, memory_format=layout(x, w))


def conv_gradient_reference(
    grad: Tensor,
    scale_grad: Tensor | None,
    format_grad: str,
    other: Tensor,
    scale_other: Tensor | None,
    format_other: str,
    size: list[int],
    of_input: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """dX (`of_input`, `other` is W) or dW (`other` is X), of shape `size`, from dY: one of the two gradient GEMMs."""
    dy, known = operand(grad, format_grad), operand(other, format_other)
    if scale_other is not None and scale_other.dim() > 0:  # a weight's, per output channel: the sum goes over these
        known, scale_other = known * scale_other, None
    wanted = dy.new_empty(1).expand(size)
    x, w = (wanted, known) if of_input else (known, wanted)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    results = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, [of_input, not of_input, False])
    return apply_scales(results[0 if of_input else 1], scale_grad, scale_other).to(dtype).contiguous()


conv_gradient = define(
    "conv_gradient(Tensor grad, Tensor? scale_grad, str format_grad, Tensor other, Tensor? scale_other, str format_other,"
    " SymInt[] size, bool of_input, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding,"
    " SymInt groups, ScalarType dtype) -> Tensor",
    conv_gradient_reference,
    lambda grad, sg, fg, other, so, fo, size, *rest: grad.new_empty(size, dtype=rest[-1]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, b, input, weight, _, scales, rng, *geometry, ctx.site, ctx.input_spec, ctx.weight_spec, backward, _ = inputs
    ctx.geometry = tuple(geometry)
    ctx.spec = SiteSpec.parse_backward(backward)
    ctx.shapes, ctx.dtypes = (x.shape, w.shape), (x.dtype, w.dtype)
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.save_for_backward(*Saved.of(x, w, input, weight, ctx.spec.replace(save_for_backward="fp8")).tensors(), scales, rng)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, scales, rng = ctx.saved_tensors
    saved, needs = Saved.restore(tuple(tensors)), ctx.needs_input_grad
    state = Backward(ctx.site, ctx.spec, rng, scales)
    grad = grad.contiguous()
    quantized = state.quantize(grad, [1])
    dx = _gradient(ctx, state, grad, quantized, (saved.weight, saved.w, ctx.weight_spec), of_input=True) if needs[0] else None
    dw = _gradient(ctx, state, grad, quantized, (saved.input, saved.x, ctx.input_spec), of_input=False) if needs[1] else None
    db = None
    if ctx.bias_dtype is not None and needs[2]:
        db = grad.sum([0, *range(2, grad.dim())], dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    row = state.statistics(grad) if needs[5] else None
    return dx, dw, db, None, None, row, *([None] * 13)


def _gradient(
    ctx: Any, state: Backward, grad: Tensor, quantized: Operand, other: tuple[list[Tensor], Tensor | None, str], of_input: bool
) -> Tensor:
    role = "grad_input" if of_input else "grad_weight"
    pair, kept, spec = other
    index = 0 if of_input else 1
    known = backward_operand(pair, spec) if kept is None else Operand(kept)
    dy = quantized if state.fp8(role) else Operand(grad)
    result = conv_gradient(
        dy.values,
        dy.scale,
        dy.format,
        known.values,
        known.scale,
        known.format,
        list(ctx.shapes[index]),
        of_input,
        *ctx.geometry,
        torch.float32 if getattr(ctx.spec, role) is not None else ctx.dtypes[index],
    )
    return state.round(result, role, ctx.dtypes[index])


conv = define(
    "conv(Tensor x, Tensor w, Tensor? b, Tensor[] input, Tensor[] weight, Tensor? meter, Tensor? scales, Tensor? rng, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups,"
    " str site, str input_spec, str weight_spec, str backward, ScalarType dtype) -> Tensor",
    conv_reference,
    conv_fake,
    setup_context=_setup,
    backward=_backward,
)
