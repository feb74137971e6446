"""What the site operators share: their list arguments as GEMM operands, and the gradient side of a backward formula.

A site operator takes each quantized operand as a list, so that one schema serves every recipe:

    []                  the operand stays in high precision: the anchor itself is multiplied
    [q, scale]          one quantization serves both GEMMs that read the operand
    [q, scale, qt, st]  scales per row or block differ with the axis that is contracted: a second quantization for backward

AOTAutograd traces these functions inside the operators' backward formulas: they only call torch and fp8fx operators.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.ops.casts import cast, cast_current
from fp8fx.ops.kept import mark
from fp8fx.ops.quantize import GRADIENTS, as_matrix, meter_row, quantize, round_values
from fp8fx.ops.rounded_mm import rounded_mm, rounds_in_place
from fp8fx.ops.scaled_mm import scaled_mm
from fp8fx.ops.stochastic_mm import stochastic_mm
from fp8fx.spec import ACCUMULATORS, GEMMS, SiteSpec, TensorSpec, needs_two, turned

__all__ = ["Backward", "Operand", "as_matrix", "backward_operand", "forward_operand", "gemm", "needs_two", "quantized_operand", "turned"]


@dataclass(frozen=True)
class Operand:
    """One operand of a GEMM: codes with scale (None: 1), or a high-precision tensor with an empty format."""

    values: Tensor
    scale: Tensor | None = None
    format: str = ""
    block: tuple[int, ...] = ()

    @property
    def mT(self) -> Operand:  # the name torch.Tensor gives the same thing
        """The operand with its last two dimensions swapped, scales included."""
        scale = self.scale if self.scale is None or self.scale.dim() == 0 else self.scale.mT
        return Operand(self.values.mT, scale, self.format, self.block[::-1])

    def flat(self) -> Operand:
        """[..., M, K] as [prod(...) M, K]; only for operands with one scale, or quantized flat already."""
        return dataclasses.replace(self, values=as_matrix(self.values))

    def arguments(self) -> tuple[Tensor, Tensor | None, str, list[int]]:
        return self.values, self.scale, self.format, list(self.block)


def quantized_operand(pair: list[Tensor], spec: TensorSpec) -> Operand:
    return Operand(pair[0], pair[1], spec.format, () if isinstance(spec.granularity, str) else spec.granularity)


def forward_operand(anchor: Tensor, quantized: list[Tensor], spec: str) -> Operand:
    """The operand of the output GEMM."""
    return quantized_operand(quantized[:2], TensorSpec.parse(spec)) if quantized else Operand(anchor)


def backward_operand(pair: list[Tensor], spec: str) -> Operand:
    """The operand of the gradient GEMM, which contracts the other axis."""
    return quantized_operand(pair, turned(TensorSpec.parse(spec)))


def cast_operands(
    x: Tensor, spec: TensorSpec, rng: Tensor | None, site: str, role: str, scale: Tensor | None, record: Tensor | None, layout: str
) -> tuple[Operand, Operand]:
    """`x` [M, K] as an operand contracted over K, and as one contracted over M; for the one that `layout` leaves out, no elements."""
    if spec.scaling == "current":
        q, qt, by_row, by_column = cast_current(x, spec.text, rng, site, role, record, layout)
        pairs = [q, by_row], [qt, by_row if spec.granularity == "tensor" else by_column]
    else:
        known = scale if spec.scaling == "delayed" else None
        q, qt = cast(x, spec.text, rng, site, role, known, record, layout)
        if known is None:
            return Operand(q, None, spec.format), Operand(qt, None, spec.format)
        pairs = [q, known], [qt, known]
    return quantized_operand(pairs[0], spec), quantized_operand(pairs[1], turned(spec))


def gemm(a: Operand, b: Operand, dtype: torch.dtype, accumulate: str = "precise") -> Tensor:
    return scaled_mm(*a.arguments(), *b.arguments(), None, dtype, accumulate)


@dataclass
class Backward:
    """One backward pass of one site: its name, its roles, and what of the forward call it belongs to.

    rng: int64 [seed, step, call]. scales: float32 [3], of GRADIENTS, read where a role's scaling is delayed. What it measures on
    the way (`amax`, by role, and the codes of dY) ends in the meter's row; or, where *lower* asks for that, in `record`, float32
    [3, RECORD], at once.
    """

    site: str
    spec: SiteSpec
    rng: Tensor | None
    scales: Tensor | None
    amax: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None
    record: Tensor | None = None

    def fp8(self, which: str) -> bool:
        return which in self.spec.gemms

    def scale(self, role: str) -> Tensor | None:
        """The scale that was given for `role`; None if it is computed from the tensor."""
        delayed = getattr(self.spec, role).scaling == "delayed"
        return self.scales[GRADIENTS.index(role)] if delayed and self.scales is not None else None

    def quantize(self, grad: Tensor, dims: list[int]) -> Operand:
        """`grad` as an operand contracted over `dims`; in high precision if the role is none, and while calibrating."""
        spec = self.spec.grad_output
        if spec is None:
            return Operand(grad)
        known = self.scale("grad_output")
        q, scale, amax = quantize(grad, spec.text, dims, self.rng, self.site, "grad_output", known)
        self.amax["grad_output"] = amax
        if self.spec.calibrating:
            return Operand(grad)
        self.codes = q
        return quantized_operand([q, scale], spec)

    def cast(self, grad: Tensor, layout: str = "both") -> tuple[Operand, Operand]:
        """`grad` [M, N] as the operand of the grad_input GEMM, [M, N], and of the grad_weight GEMM, [M, N] column-major."""
        spec = self.spec.grad_output
        assert spec is not None
        record = self.own_record("grad_output")
        return cast_operands(grad, spec, self.rng, self.site, "grad_output", self.scale("grad_output"), record, layout)

    def own_record(self, role: str) -> Tensor | None:
        return None if self.record is None else mark(self.record[GRADIENTS.index(role)])

    def quantize_other_axis(self, grad: Tensor, dims: list[int]) -> Operand:
        """`grad` once more, for the GEMM that contracts the other axis: scales per row or block differ."""
        assert self.spec.grad_output is not None
        spec = turned(self.spec.grad_output)
        q, scale, _ = quantize(grad, spec.text, dims, self.rng, self.site, "grad_output")
        return quantized_operand([q, scale], spec)

    def product(self, a: Operand, b: Operand, role: str, dtype: torch.dtype) -> Tensor:
        """The gradient GEMM of `role`, rounded once from the fp32 accumulator if the role says so, in `dtype`."""
        spec: TensorSpec | None = getattr(self.spec, role)
        rounds = spec is not None
        accumulate = self.spec.accumulate[GEMMS.index(role)]
        if spec is not None and self.spec.columns and rounds_in_place(spec):  # nobody asks for its amax there
            return rounded_mm(*a.arguments(), *b.arguments(), None, dtype, accumulate, spec.text, self.rng, self.site, role)
        return self.round(self.gemm(a, b, torch.float32 if rounds else dtype, accumulate, role), role, dtype)

    def gemm(self, a: Operand, b: Operand, dtype: torch.dtype, accumulate: str, role: str) -> Tensor:
        """`gemm`, with the random words of this role where the arithmetic draws any."""
        if accumulate in ACCUMULATORS or not Arithmetic.parse(accumulate).stochastic:
            return gemm(a, b, dtype, accumulate)
        return stochastic_mm(*a.arguments(), *b.arguments(), None, dtype, accumulate, self.rng, self.site, role)

    def round(self, grad: Tensor, role: str, dtype: torch.dtype) -> Tensor:
        spec: TensorSpec | None = getattr(self.spec, role)
        if spec is None:
            return grad.to(dtype)
        rounded, self.amax[role] = round_values(grad, spec.text, self.rng, self.site, role, self.scale(role))
        return grad.to(dtype) if self.spec.calibrating else rounded.to(dtype)

    def statistics(self, grad: Tensor) -> Tensor:
        """The meter's row, float32 [STATISTICS]: asked for last, when everything is measured.

        It is returned as the meter's "gradient": so no operator mutates state (docs/decisions).
        """
        spec = "" if self.spec.grad_output is None else self.spec.grad_output.text
        return meter_row(grad, self.codes, spec, *(self.amax.get(role) for role in GRADIENTS))
