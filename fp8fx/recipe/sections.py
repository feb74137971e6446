"""The sections of a recipe that are about the whole model: the boundary, delayed scaling, scales, loss scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, field_validator

from fp8fx.recipe.source import shorten
from fp8fx.recipe.values import (
    OR_NONE,
    Count,
    CountFrom1,
    Fraction,
    Growth,
    HistoryAlgorithm,
    LossScalingMode,
    Mode,
    Positive,
    ScaleOrder,
    Switch,
    field,
    refusal,
)


class Model(BaseModel):
    """A frozen mapping that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Boundary(Model):
    """Modes for the first and the last layer with a weight, in execution order; applied before the rules."""

    first: Annotated[Mode | None, OR_NONE] = field("mode of the first layer; none: as any other", default=None)
    last: Annotated[Mode | None, OR_NONE] = field("mode of the last layer; none: as any other", default=None)

    @field_validator("first", "last", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return None if value is False or value == "none" else value


class Delayed(Model):
    """How delayed scales follow from earlier amax values."""

    history: CountFrom1 = field("steps remembered", default=16)
    algorithm: HistoryAlgorithm = field("which of them counts", default="max")
    margin: Count = field("powers of two left as headroom", default=0)
    order: ScaleOrder = field("whether the scale is updated before or after quantizing", default="after")


class Scale(Model):
    """How an amax becomes a scale."""

    power_of_two: Switch = field("only powers of two as scales", default=False)
    eps: Positive = field("the smallest amax", default=1e-12)


class LossScaling(Model):
    """Loss scaling, in the words of torch.amp.GradScaler."""

    mode: LossScalingMode = field(
        "dynamic: shrinks at inf or NaN, else grows; by default dynamic if defaults.mode is direct, else none", default="none"
    )
    init: Positive = field("the first scale", default=65536.0)
    growth_interval: CountFrom1 = field("steps without inf or NaN before the scale grows", default=2000)
    growth_factor: Growth = field("what it grows by", default=2.0)
    backoff_factor: Fraction = field("what it shrinks by after an inf or NaN", default=0.5)
    minimum: dict[Count, Positive] = field("{step: least scale from there on}; an extending recipe replaces it whole", default={})

    @field_validator("minimum", mode="before")
    @classmethod
    def _steps(cls, value: object) -> object:
        """Two keys such as 0 and "0" would be one step."""
        if not isinstance(value, Mapping):
            raise ValueError(refusal(value, "a mapping such as {0: 1, 40000: 8192}"))
        if len({str(step) for step in value}) < len(value):
            raise ValueError(f"got {shorten(value)}; a step is written twice")
        return value

    def __hash__(self) -> int:
        return hash(self.model_dump_json())
