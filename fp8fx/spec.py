"""What one quantization does (`TensorSpec`) and what one site does (`SiteSpec`), as values with a text form.

A *site* is one place in the graph that multiplies: a linear, matmul, convolution, embedding or attention call. *annotate*
writes a SiteSpec on it; *insert_qdq* passes the text form to the operators, so that a printed graph says everything:

    quantize(x, 'e4m3fn/current/tensor/nearest_even/saturate')

Roles, in the words of the recipe:  Y = X W^T        output      reads input, weight     may round output
                                    dX = dY W        grad_input  reads grad_output, weight  may round grad_input
                                    dW = dY^T X      grad_weight reads grad_output, input   may round grad_weight
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

ROLES = ("input", "weight", "output", "grad_output", "grad_input", "grad_weight")
GEMMS = ("output", "grad_input", "grad_weight")
SCALINGS = ("none", "current", "delayed", "fixed")
STATISTICS = ("max", "mean", "percentile", "mse")
SCALE_FORMATS = ("float32", "e8m0")
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
OVERFLOWS = ("saturate", "nonfinite")
ACCUMULATORS = ("fast", "precise")
SIDES = (32, 64, 128)  # of the blocks that kernels have

Granularity = str | tuple[int, int]  # "tensor", "row", or (rows, columns) of a block


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor becomes codes and scale: `x ~ q * scale`.

    format: canonical name in `fp8fx.formats`. scaling: none (scale is 1), current (from this tensor), delayed, fixed (from `max_value`).
    granularity: one scale per tensor, per row (slice along the contraction) or per block (rows, columns); a group of N is the block (1, N).
    statistic: what of |x| a current scale brings to the largest code, times `clip`. percentile: in (0, 100], for that statistic.
    scale_format: float32, or e8m0: a power of two by the rule of OCP MX.
    """

    format: str
    scaling: str = "current"
    granularity: Granularity = "tensor"
    rounding: str = "nearest_even"
    overflow: str = "saturate"
    power_of_two: bool = False
    eps: float = 1e-12
    max_value: float | None = None
    statistic: str = "max"
    percentile: float = 99.9
    clip: float = 1.0
    scale_format: str = "float32"

    @property
    def text(self) -> str:
        """The canonical text, e.g. `e4m3fn/current/128x128/nearest_even/saturate/power_of_two`."""
        block = self.granularity
        parts = [self.format, self.scaling, block if isinstance(block, str) else f"{block[0]}x{block[1]}", self.rounding, self.overflow]
        if self.power_of_two:
            parts.append("power_of_two")
        if self.eps != 1e-12:
            parts.append(f"eps={self.eps!r}")
        parts += [f"{key}={value}" for key, default in _FURTHER.items() if (value := getattr(self, key)) != default]
        return "/".join(parts)

    @property
    def on_hardware(self) -> bool:
        """False if its scales are not of the kinds that kernels make: such a tensor is always emulated."""
        return self.scaling != "fixed" and all(getattr(self, key) == default for key, default in _FURTHER.items())

    @property
    def sides_on_hardware(self) -> bool:
        """False if its scales are of blocks that kernels do not have: those have one of SIDES, in one direction or in both."""
        block = self.granularity
        return isinstance(block, str) or (max(block) in SIDES and set(block) <= {1, max(block)})

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def idempotent(self) -> bool:
        """True if quantizing a dequantized value gives the same codes back: unscaled and deterministic."""
        return self.scaling == "none" and not self.stochastic

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> TensorSpec:
        """Read `text` back. `TensorSpec.parse(s.text) == s` for every spec."""
        format_, scaling, block, rounding, overflow, *rest = text.split("/")
        granularity: Granularity = block
        if block not in ("tensor", "row"):
            rows, columns = block.split("x")
            granularity = (int(rows), int(columns))
        written = dict(part.split("=", 1) for part in rest if "=" in part)
        return TensorSpec(
            format=format_,
            scaling=scaling,
            granularity=granularity,
            rounding=rounding,
            overflow=overflow,
            power_of_two="power_of_two" in rest,
            **{key: value if key in _WORDS else float(value) for key, value in written.items()},  # type: ignore[arg-type]
        )


_WORDS = ("statistic", "scale_format")
# What is not written in a text where it is the default.
_FURTHER = {key: getattr(TensorSpec, key) for key in ("max_value", "statistic", "percentile", "clip", "scale_format")}


def turned(spec: TensorSpec) -> TensorSpec:
    """`spec` for the same tensor contracted over its other axis: a block of r x c becomes c x r."""
    if isinstance(spec.granularity, str):
        return spec
    return dataclasses.replace(spec, granularity=spec.granularity[::-1])


def needs_two(spec: TensorSpec) -> bool:
    """True if the two GEMMs that read a tensor need two quantizations of it."""
    return spec.granularity == "row" or turned(spec) != spec


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """What one site does: a TensorSpec or None (high precision) per role, and which of its GEMMs run in FP8.

    `gemms` holds the GEMMs that read quantized operands; the others read the high-precision tensors.
    `accumulate` names, per GEMM, Hopper's `fast` accumulator or the `precise` one, where the CPU reference always has fp32; or the text of
    an `fp8fx.arithmetic.Arithmetic`, which runs as a study everywhere.
    """

    input: TensorSpec | None = None
    weight: TensorSpec | None = None
    output: TensorSpec | None = None
    grad_output: TensorSpec | None = None
    grad_input: TensorSpec | None = None
    grad_weight: TensorSpec | None = None
    gemms: tuple[str, ...] = GEMMS
    accumulate: tuple[str, str, str] = ("fast", "precise", "precise")
    save_for_backward: str = "fp8"
    weight_transpose: str = "recompute"
    save_activation_inputs: str = "model"
    weight_cache: str = "none"
    columns: bool = False  # lower: `cast` and records in place of `quantize` and the meter, codes in the layouts that kernels want
    calibrating: bool = False  # measure every role's amax and round nothing; no GEMM is in FP8 then

    def replace(self, **changes: object) -> SiteSpec:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def arithmetic(self) -> str | None:
        """The text of the output GEMM's arithmetic, where it is not an ordinary product."""
        return None if self.accumulate[0] in ACCUMULATORS else self.accumulate[0]

    @property
    def backward_text(self) -> str:
        """What the backward formula of the site's operator needs, as the text the operator takes.

        `;`-separated `key=value`; a role that stays in high precision is left out.
        """
        roles = ("output", *ROLES[3:]) if self.columns else ROLES[3:]  # lower lets the product itself round the output
        parts = [f"{role}={spec.text}" for role in roles if (spec := getattr(self, role)) is not None]
        parts.append("gemms=" + ",".join(self.gemms))
        if self.save_for_backward != "fp8":
            parts.append("save_for_backward=" + self.save_for_backward)
        if self.weight_transpose != "recompute":
            parts.append("weight_transpose=" + self.weight_transpose)
        if self.save_activation_inputs != "model":
            parts.append("save_activation_inputs=" + self.save_activation_inputs)
        if self.accumulate != SiteSpec.accumulate:
            parts.append("accumulate=" + ",".join(self.accumulate))
        parts += [f"{flag}=yes" for flag in ("columns", "calibrating") if getattr(self, flag)]
        return ";".join(parts)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse_backward(text: str) -> SiteSpec:
        """Read `backward_text` back: the gradient roles and the GEMMs; the forward roles are None, but for an output that is rounded
        where it is made."""
        fields: dict[str, object] = {}
        for part in text.split(";"):
            key, value = part.split("=", 1)
            if key in ("gemms", "accumulate"):
                fields[key] = tuple(filter(None, value.split(",")))
            elif key in ("columns", "calibrating"):
                fields[key] = True
            else:
                fields[key] = value if key.startswith(("save_", "weight_")) else TensorSpec.parse(value)
        return SiteSpec(**fields)  # type: ignore[arg-type]
