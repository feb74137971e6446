"""linear: Y = X W^T + b, with the three GEMMs of its forward and backward each in FP8 or in high precision.

    linear(x, w, b, input, weight, meter, scales, rng, site, input_spec, weight_spec, backward, dtype) -> y

`x` [..., K] and `w` [N, K] are the anchors: they carry the gradient and are not read where `input` and `weight` hold codes.
Saved for backward are codes and scales only, unless a GEMM runs in high precision. Where *lower* writes `columns`, the codes of each GEMM
are laid out as kernels want them, those of W are made from W again in backward, and `meter` is a record (ops/casts.py), float32 [3, 4];
and where `backward` names an `output`, y is rounded to its grid from the fp32 sums.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8fx.ops.kept import keep
from fp8fx.ops.library import define
from fp8fx.ops.operands import Backward, Operand, backward_operand, cast_operands, forward_operand
from fp8fx.ops.quantize import as_matrix, quantize
from fp8fx.ops.rounded_mm import rounded_mm_reference
from fp8fx.ops.scaled_mm import scaled_mm_reference
from fp8fx.spec import SiteSpec, TensorSpec, turned


def linear_reference(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    input: list[Tensor],
    weight: list[Tensor],
    meter: Tensor | None,
    scales: Tensor | None,
    rng: Tensor | None,
    site: str,
    input_spec: str,
    weight_spec: str,
    backward: str,
    dtype: torch.dtype,
) -> Tensor:
    spec = SiteSpec.parse_backward(backward)
    if "output" not in spec.gemms:
        return F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))
    left, right = forward_operand(x, input, input_spec), forward_operand(w, weight, weight_spec).mT
    operands = (*left.arguments(), *right.arguments(), b, dtype, spec.accumulate[0])
    if spec.output is not None:
        return rounded_mm_reference(*operands, spec.output.text, rng, site, "output")
    return scaled_mm_reference(*operands, rng, site)


def linear_fake(x: Tensor, w: Tensor, b: Tensor | None, input: list[Tensor], weight: list[Tensor], *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=rest[-1])


@dataclass(frozen=True)
class Saved:
    """What a site's backward reads: a pair of codes and scale, or the high-precision tensor where a GEMM wants that.

    input_scale: that of an X which is kept and quantized once more in backward. weight_scale: of a W whose column-major codes are made
    from the parameter in backward, which keeps no codes of it.
    """

    input: list[Tensor]
    weight: list[Tensor]
    x: Tensor | None
    w: Tensor | None
    input_scale: Tensor | None = None
    weight_scale: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, w: Tensor, input: list[Tensor], weight: list[Tensor], spec: SiteSpec) -> Saved:
        keep_x = not input or "grad_weight" not in spec.gemms or spec.save_for_backward == "high_precision"
        keep_w = not weight or "grad_input" not in spec.gemms
        scale = input[1] if keep_x and input and spec.save_for_backward == "high_precision" else None
        return cls([] if keep_x else input[-2:], [] if keep_w else weight[-2:], x if keep_x else None, w if keep_w else None, scale)

    def recasting(self, w: Tensor) -> Saved:
        """The same with W itself, which is there anyway, instead of its codes; a pair that is column-major already stays."""
        return dataclasses.replace(self, weight=[], w=w, weight_scale=self.weight[1])

    def tensors(self) -> list[Tensor | None]:
        nothing: list[Tensor | None] = [None, None]
        return [*(self.input or nothing), *(self.weight or nothing), self.x, self.w, self.input_scale, self.weight_scale]

    @classmethod
    def restore(cls, tensors: tuple[Tensor | None, ...]) -> Saved:
        pairs = [[t for t in tensors[i : i + 2] if t is not None] for i in (0, 2)]
        return cls(pairs[0], pairs[1], *tensors[4:])


@dataclass(frozen=True)
class LinearBackward:
    """The backward formula of one linear, also used inside the compound operators."""

    state: Backward
    saved: Saved
    input_spec: str
    weight_spec: str
    dtypes: tuple[torch.dtype, torch.dtype]  # of X and of W

    def __call__(self, grad: Tensor, needs_x: bool, needs_w: bool, needs_meter: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX [..., K], dW [N, K], meter row) from dY [..., N]."""
        flat = as_matrix(grad).contiguous()  # [M, N]
        by_columns = None
        if self.state.spec.columns:
            quantized, by_columns = self.state.cast(flat, _layout(needs_x, needs_w))
        else:
            quantized = self.state.quantize(flat, [-1])
        dx, dw = self.products(flat, quantized, by_columns, needs_x, needs_w)
        dx = None if dx is None else dx.reshape(*grad.shape[:-1], dx.shape[-1])
        return dx, dw, self.state.statistics(flat) if needs_meter else None

    def products(
        self, flat: Tensor, quantized: Operand, by_columns: Operand | None, needs_x: bool, needs_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dX [M, K], dW [N, K]) from dY [M, N] and its codes, those for the grad_weight GEMM made here where they are not given."""
        dx = self._grad_input(flat, quantized) if needs_x else None
        return dx, self._grad_weight(flat, quantized, by_columns) if needs_w else None

    def _grad_input(self, flat: Tensor, quantized: Operand) -> Tensor:
        """dX [M, K] = dY [M, N] W [N, K]."""
        if not self.state.fp8("grad_input"):
            return self.state.round(flat @ _present(self.saved.w).to(flat.dtype), "grad_input", self.dtypes[0])
        return self.state.product(quantized, self._weight(), "grad_input", self.dtypes[0])

    def _weight(self) -> Operand:
        if self.saved.weight:
            return backward_operand(self.saved.weight, self.weight_spec)
        w, scale = _present(self.saved.w), self.saved.weight_scale
        if scale is None:
            return Operand(w)
        spec = TensorSpec.parse(self.weight_spec)
        if spec.granularity == "tensor":  # under the scale of forward: the same codes
            spec = dataclasses.replace(spec, scaling="delayed" if spec.scaling == "current" else spec.scaling)
        return cast_operands(w, spec, self.state.rng, self.state.site, "weight", scale, None, "transposed")[1]

    def _grad_weight(self, flat: Tensor, quantized: Operand, by_columns: Operand | None) -> Tensor:
        """dW [N, K] = dY^T [N, M] X [M, K]."""
        if not self.state.fp8("grad_weight"):
            x = _present(self.saved.x)
            return self.state.round(flat.mT @ as_matrix(x).to(flat.dtype), "grad_weight", self.dtypes[1])
        if by_columns is None:
            by_columns = quantized
            if quantized.scale is not None and quantized.scale.dim() > 0:  # rows or blocks: this GEMM contracts the tokens
                by_columns = self.state.quantize_other_axis(flat, [0])
        return self.state.product(by_columns.mT, self._input().flat(), "grad_weight", self.dtypes[1])

    def _input(self) -> Operand:
        if self.saved.input:
            return backward_operand(self.saved.input, self.input_spec)
        x = _present(self.saved.x)
        if not self.input_spec:
            return Operand(x)
        # save_for_backward: high_precision keeps X itself: the codes of forward are made once more, bit for bit.
        spec = turned(TensorSpec.parse(self.input_spec))
        known = self.saved.input_scale if spec.scaling == "delayed" else None
        q, scale, _ = quantize(as_matrix(x), spec.text, [0], self.state.rng, self.state.site, "input", known)
        return backward_operand([q, scale], self.input_spec)


def _layout(needs_x: bool, needs_w: bool) -> str:
    return "both" if needs_x and needs_w else "transposed" if needs_w else "rows"


def _present(x: Tensor | None) -> Tensor:
    assert x is not None, "Saved.of keeps a tensor for every GEMM that is not in FP8"
    return x


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over all rows of the unquantized gradient, accumulated in fp32."""
    return as_matrix(grad).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)


def linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, b, input, weight, meter, scales, rng, ctx.site, ctx.input_spec, ctx.weight_spec, backward, _ = inputs
    ctx.spec = SiteSpec.parse_backward(backward)
    ctx.dtypes = (x.dtype, w.dtype)
    ctx.bias_dtype = None if b is None else b.dtype
    saved = Saved.of(x, w, input, weight, ctx.spec)
    saved = saved.recasting(w) if ctx.spec.columns and len(weight) == 2 else saved
    ctx.save_for_backward(*saved.tensors(), scales, rng)
    keep(ctx, meter if ctx.spec.columns else None)


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, scales, rng = ctx.saved_tensors
    needs = ctx.needs_input_grad
    state = Backward(ctx.site, ctx.spec, rng, scales, record=ctx.records[0])
    formula = LinearBackward(state, Saved.restore(tuple(saved)), ctx.input_spec, ctx.weight_spec, ctx.dtypes)
    dx, dw, row = formula(grad, needs[0], needs[1], needs[5])
    db = bias_gradient(grad, ctx.bias_dtype) if ctx.bias_dtype is not None and needs[2] else None
    return dx, dw, db, None, None, row, *([None] * 7)


linear = define(
    "linear(Tensor x, Tensor w, Tensor? b, Tensor[] input, Tensor[] weight, Tensor? meter, Tensor? scales, Tensor? rng,"
    " str site, str input_spec, str weight_spec, str backward, ScalarType dtype) -> Tensor",
    linear_reference,
    linear_fake,
    setup_context=linear_setup,
    backward=linear_backward,
)
