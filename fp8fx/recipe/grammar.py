"""The grammar of a recipe as typed models: what may be written, key by key.

    Document    one recipe
    ├── Layer       `defaults`: what every layer gets
    │   ├── Role        input, weight, output, grad_output, grad_input, grad_weight
    │   └── Study       arithmetic
    ├── Boundary    the first and the last layer
    ├── Rule        a Layer with a `match`: only the keys it writes count
    │   └── Match       name, type, op, min_numel, max_numel
    └── Delayed, Scale, LossScaling

A model remembers which keys were written (`model_fields_set`); `merge` uses nothing else of a rule. `presets` fills in what a
mode implies, `checks` refuses combinations. Models are frozen values: they compare, hash, copy and pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, ValidationInfo, field_validator, model_validator

from fp8fx import formats
from fp8fx.arithmetic.spec import Arithmetic, check_once
from fp8fx.errors import FP8Error
from fp8fx.recipe.sections import Boundary, Delayed, LossScaling, Model, Scale
from fp8fx.recipe.source import shorten
from fp8fx.recipe.values import (
    LISTED,
    OR_NONE,
    OR_ONE,
    Accumulator,
    ActivationInputs,
    Also,
    Attention,
    Count,
    Format,
    Granularity,
    Mode,
    OpKind,
    Overflow,
    Pattern,
    Percentile,
    Positive,
    Precision,
    Rounding,
    ScaleFormat,
    Scaling,
    Seed,
    Statistic,
    Switch,
    Text,
    Version,
    WeightCache,
    WeightTranspose,
    WhenNotFaster,
    Whole,
    field,
    refusal,
)


class Role(Model):
    """How one tensor of a layer is quantized. A key left out keeps what the role has: at first, what the mode says."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _drop_defaults(schema))

    format: Format = field("number format: any eXmY or intN, a torch dtype, or an mx name for all of a role", default="e4m3fn")
    scaling: Scaling = field(
        "none: scale 1; current: from this tensor's statistic; delayed: from earlier steps; fixed: from max_value", default="current"
    )
    max_value: Annotated[Positive | None, OR_NONE] = field("fixed: the magnitude that becomes the largest code", default=None)
    statistic: Statistic = field("current: what of |x| becomes the largest code; mse: what gives the least squared error", default="max")
    percentile: Annotated[Percentile | None, OR_NONE] = field("for statistic: percentile; 99.9 if it is not written", default=None)
    clip: Positive = field("current: multiplies the statistic", default=1.0)
    granularity: Granularity = field(
        "one scale per tensor, per row of the contraction, per group of N along it, or per [rows, columns] block", default="tensor"
    )
    scale_format: ScaleFormat = field(
        "e8m0: powers of two by the rule of OCP MX, 2^(floor(log2 amax) - floor(log2 fmax))", default="float32"
    )
    power_of_two: Annotated[Switch | None, OR_NONE] = field("only powers of two as scales; else as scale.power_of_two says", default=None)
    rounding: Rounding = field("how a value between two codes is rounded", default="nearest_even")
    overflow: Overflow = field("what becomes of values beyond the largest: the largest, or inf and NaN", default="saturate")

    @model_validator(mode="before")
    @classmethod
    def _mx(cls, data: object) -> object:
        """`format: mxfp4` writes all that the OCP formats say, under the keys beside it."""
        name = data.get("format") if isinstance(data, Mapping) else None
        if not isinstance(name, str) or name not in formats.MX:
            return data
        assert isinstance(data, Mapping)
        whole = {"scaling": "current", "granularity": {"group": 32}, "scale_format": "e8m0", "overflow": "saturate"}
        return whole | {**data, "format": formats.MX[name]}

    @field_validator("max_value", "percentile", "power_of_two", mode="before")
    @classmethod
    def _unset(cls, value: object) -> object:
        return None if value == "none" else value


def _role(value: object) -> object:
    """`none`, null, and YAML's `off` leave the tensor in high precision."""
    if value is None or value is False or value == "none":
        return None
    if not isinstance(value, Mapping | Role):
        raise ValueError(refusal(value, "none or a mapping such as {format: e4m3fn}"))
    return value


OptionalRole = Annotated[Role | None, BeforeValidator(_role), OR_NONE]


class Gemms(Model):
    """Which of a layer's three multiplications read quantized operands."""

    output: Precision = field("Y = X W^T", default="fp8")
    grad_input: Precision = field("dX = dY W", default="fp8")
    grad_weight: Precision = field("dW = dY^T X", default="fp8")


class Accumulate(Model):
    """The accumulator of each multiplication on a GPU; the CPU reference always has fp32."""

    output: Accumulator = field("of Y: the fast accumulator of Hopper, or promotion to fp32", default="fast")
    grad_input: Accumulator = field("of dX", default="precise")
    grad_weight: Accumulator = field("of dW", default="precise")


_CHUNKS = {"type": "object", "properties": {"chunk": {"type": "integer"}, "inner": {"type": "string"}, "outer": {"type": "string"}}}


class Study(Model):
    """The arithmetic of a layer's products, in the words of `fp8fx.arithmetic`; a layer's keys replace another's as a whole."""

    multiplier: Text = field("exact, mitchell, the path of a .npy table (from this file), or a registered name", default="exact")
    products: Text = field("format of each product: float32, float16, bfloat16, any eXmY", default="float32")
    accumulate: Annotated[Text, Also(_CHUNKS)] = field(
        "format of the running sum, or hopper_fast; or {chunk, inner, outer}", default="float32"
    )
    chunk: Count = field("elements of the contraction in one partial sum; 0: all", default=0)
    outer: Text = field("format of the sum of partial sums", default="float32")
    output: Text = field("format of the finished sum, before scales and bias", default="float32")
    shift: Whole = field("products are multiplied by 2^shift before they are rounded, the sum by 2^-shift", default=0)
    rounding: Text = field("of products and sums: the words of a role", default="nearest_even")
    overflow: Overflow = field("of products and sums: an adder overflows to inf", default="nonfinite")
    gradients: Text = field("exact: gradient multiplications are ordinary ones; same: they use this arithmetic too", default="exact")

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: object, info: ValidationInfo) -> object:
        """{accumulate: {chunk: 64, inner: float16}} as keys side by side; a relative path is one from the recipe's folder."""
        if not isinstance(value, Mapping):
            return value
        data = dict(value)
        sums = data.get("accumulate")
        if isinstance(sums, Mapping):
            if (unknown := [key for key in sums if key not in ("chunk", "inner", "outer")]) or "chunk" not in sums:
                raise ValueError(f"accumulate: got {shorten(unknown or sums)}; allowed: {{chunk: 64, inner: float16, outer: float32}}")
            del data["accumulate"]
            try:
                check_once(sums, data)
            except FP8Error as error:
                raise ValueError(str(error)) from None
            data |= {"accumulate" if key == "inner" else key: entry for key, entry in sums.items()}
        path, folder = data.get("multiplier"), (info.context or {}).get("folder", "")
        if isinstance(path, str) and path.endswith(".npy"):
            data["multiplier"] = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
        return data

    @model_validator(mode="after")
    def _possible(self) -> Study:
        try:
            self.arithmetic()
        except FP8Error as error:
            raise ValueError(str(error)) from None
        return self

    def arithmetic(self) -> Arithmetic:
        return Arithmetic(**dict(self))


def _study(value: object) -> object:
    if value is None or value is False or value == "none":
        return None
    if not isinstance(value, Mapping | Study):
        raise ValueError(refusal(value, "none or a mapping such as {multiplier: mitchell, accumulate: float16}"))
    return value


OptionalStudy = Annotated[Study | None, BeforeValidator(_study), OR_NONE]


class Layer(Model):
    """What a layer gets. In `defaults` for all, in a rule for those that match."""

    mode: Mode = field("preset: resets all roles of the layer, then the other keys beside it apply", default="hybrid")
    input: OptionalRole = field("the layer's input X", default=None)
    weight: OptionalRole = field("its weight W", default=None)
    output: OptionalRole = field("its output Y, after the bias", default=None)
    grad_output: OptionalRole = field("dY where it enters the gradient multiplications", default=None)
    grad_input: OptionalRole = field("dX where it leaves the layer", default=None)
    grad_weight: OptionalRole = field("dW before it is added to .grad", default=None)
    gemms: Gemms = field("which multiplications run in FP8", default=Gemms())
    accumulate: Accumulate = field("GPU only: the accumulator of each", default=Accumulate())
    arithmetic: OptionalStudy = field("studies: how products are multiplied and added", default=None)
    rounding: Rounding | None = field("written to every quantized role of the layer", default=None)
    overflow: Overflow | None = field("written to input, weight and output; gradients say theirs per role", default=None)
    when_not_faster: WhenNotFaster = field("GPU only: what to do where FP8 is not faster; auto: emulate off CUDA", default="auto")
    attention: Attention = field("the fused attention op; emulate quantizes q, k and v", default="high_precision")
    weight_cache: WeightCache = field("step: keep the quantized weight between optimizer steps", default="none")
    save_for_backward: Precision = field("what the layer keeps for its backward", default="fp8")
    weight_transpose: WeightTranspose = field("GPU only: where the transposed FP8 weight of the backward comes from", default="recompute")
    save_activation_inputs: ActivationInputs = field("what SwiGLU and GELU themselves keep for backward", default="model")

    @field_validator("rounding", "overflow", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        if value is None:
            raise ValueError("got None; leave the key out, or write one of the words")
        return value


class Match(Model):
    """What a rule applies to: all keys that are written must hold; within a list any entry."""

    name: Annotated[tuple[Pattern, ...], LISTED, OR_ONE] = field("module or site names: globs, or re: and a full match", default=())
    type: Annotated[tuple[Pattern, ...], LISTED, OR_ONE] = field("class names, of any class in the MRO", default=())
    op: Annotated[tuple[OpKind, ...], LISTED, OR_ONE] = field("kinds of operation", default=())
    min_numel: Count | None = field("the weight has this many elements or more", default=None)
    max_numel: Count | None = field("the weight has this many elements or fewer", default=None)


def _match(value: object) -> object:
    if isinstance(value, str):
        return {"name": [value]}
    if not isinstance(value, Mapping | Match):
        raise ValueError(refusal(value, "a pattern such as '*.fc', in quotes, or a mapping such as {type: Embedding}"))
    return value


OneMatch = Annotated[Match, BeforeValidator(_match), Also({"type": "string", "minLength": 1})]
Matches = Annotated[tuple[OneMatch, ...], LISTED, OR_ONE]


class Rule(Layer):
    """Overrides for the layers that match. Keys that are not written leave the layer as it is."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _drop_defaults(schema))

    match: Matches = field("a pattern, a mapping of name, type, op, min_numel, max_numel, or a list of them")
    optional: Switch = field("true: matching nothing is no error", default=False)
    reason: Text = field("shown in the plan", default="")
    output_fused: Switch = field("true: the output stays in high precision, because the next operation reads it so", default=False)


def _drop_defaults(schema: dict[str, Any]) -> None:
    """Where a key that is left out changes nothing, the schema must not show a default for it."""
    for name, entry in schema["properties"].items():
        if name not in ("optional", "reason"):
            entry.pop("default", None)


class Document(Model):
    """A whole recipe."""

    version: Version = field("of this grammar: 1", default=1)
    extends: Text | None = field("a shipped recipe or a file to start from", default=None)
    defaults: Layer = field("what every layer gets", default=Layer())
    boundary: Boundary = field("the first and the last layer", default=Boundary())
    rules: Annotated[tuple[Rule, ...], LISTED, OR_ONE] = field("ordered; every matching rule merges, the last writer wins", default=())
    exempt: Matches = field("patterns of layers that stay in high precision: trailing rules", default=())
    output_fused: Matches = field("patterns of layers whose output stays in high precision: trailing rules", default=())
    delayed: Delayed = field("for scaling: delayed", default=Delayed())
    scale: Scale = field("how an amax becomes a scale", default=Scale())
    loss_scaling: LossScaling = field("what fp8fx.GradScaler does", default=LossScaling())
    seed: Seed = field("of stochastic rounding", default=0)
    strict: Switch = field("false: warn about what is unmatched, unknown, empty or impossible, instead of refusing it", default=True)

    @field_validator("defaults", "boundary", "delayed", "scale", "loss_scaling", mode="before")
    @classmethod
    def _section(cls, value: object) -> object:
        """A section whose keys are all commented out reads as null."""
        return {} if value is None else value

    @field_validator("version")
    @classmethod
    def _version(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"got {value}; allowed: 1, the only version so far")
        return value
