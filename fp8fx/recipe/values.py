"""The kinds of values a recipe holds: words, numbers, formats, granularities and patterns.

Each is an annotated type for the models in `grammar`: it reads what people and YAML write, and says what is allowed otherwise.
Every problem is a ValueError whose text the loader puts behind file, line and key path.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from fp8fx import formats
from fp8fx.errors import FormatError, allowed, nearest
from fp8fx.recipe.source import shorten
from fp8fx.spec import OVERFLOWS, ROUNDINGS, SCALE_FORMATS, SCALINGS, STATISTICS
from fp8fx.spec import Granularity as Block


def refusal(value: object, what: str, words: Iterable[str] = ()) -> str:
    """`got ...; allowed: ...`, with the nearest of `words`, or a word on YAML's booleans."""
    if isinstance(value, bool):
        written = "on, yes and true" if value else "off, no and false"
        return f"got {value} (YAML reads {written} as booleans); allowed: {what}"
    hint = nearest(value, words) if isinstance(value, str) else ""
    return f"got {shorten(value)}; allowed: {what}{'.' if hint else ''}{hint}"


@dataclass(frozen=True)
class Choice:
    """One of some words. YAML's `off` and an empty value are `none` where that is a choice; else a boolean is explained."""

    words: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words)}

    def check(self, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        if (value is None or value is False) and "none" in self.words:
            return "none"
        raise ValueError(refusal(value, allowed(self.words), self.words))


MODES = ("direct", "hybrid", "exempt")
OPS = (
    "linear",
    "matmul",
    "bmm",
    "grouped_mm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "attention",
)

Mode = Annotated[str, Choice(MODES)]
Scaling = Annotated[str, Choice(SCALINGS)]
Statistic = Annotated[str, Choice(STATISTICS)]
ScaleFormat = Annotated[str, Choice(SCALE_FORMATS)]
Rounding = Annotated[str, Choice(ROUNDINGS)]
Overflow = Annotated[str, Choice(OVERFLOWS)]
Precision = Annotated[str, Choice(("fp8", "high_precision"))]
Accumulator = Annotated[str, Choice(("fast", "precise"))]
WhenNotFaster = Annotated[str, Choice(("auto", "high_precision", "emulate"))]
Attention = Annotated[str, Choice(("high_precision", "emulate"))]
WeightCache = Annotated[str, Choice(("none", "step"))]
WeightTranspose = Annotated[str, Choice(("recompute", "keep"))]
ActivationInputs = Annotated[str, Choice(("model", "fp8"))]
LossScalingMode = Annotated[str, Choice(("dynamic", "static", "none"))]
HistoryAlgorithm = Annotated[str, Choice(("max", "most_recent"))]
ScaleOrder = Annotated[str, Choice(("before", "after"))]
OpKind = Annotated[str, Choice(OPS)]


def _number(value: object) -> object:
    """PyYAML reads `1e-12` as a string (YAML 1.1 wants `1.0e-12`); read it as meant. A boolean is no number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if re.search(r"[.eE]", value) else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(refusal(value, "a number"))
    return value


def _whole(value: object) -> object:
    value = _number(value)
    if value != int(value):  # type: ignore[call-overload]
        raise ValueError(refusal(value, "a whole number"))
    return int(value)  # type: ignore[call-overload]


def _at_least(least: float, *, above: bool = False, below: float = math.inf) -> Callable[[float], float]:
    what = f"above {least:g}" if above else f"{least:g} or more"
    what += f" and below {below:g}" if below < math.inf else ""

    def check(value: float) -> float:
        if value < least or (above and value == least) or value >= below:
            raise ValueError(f"got {value:.12g}; allowed: a number {what}")
        return value

    return check


Seed = Annotated[int, BeforeValidator(_whole), AfterValidator(_at_least(0, below=2**63)), WithJsonSchema({"type": "integer", "minimum": 0})]
Version = Annotated[int, BeforeValidator(_whole), WithJsonSchema({"type": "integer", "enum": [1]})]
Count = Annotated[int, BeforeValidator(_whole), AfterValidator(_at_least(0)), WithJsonSchema({"type": "integer", "minimum": 0})]
CountFrom1 = Annotated[int, BeforeValidator(_whole), AfterValidator(_at_least(1)), WithJsonSchema({"type": "integer", "minimum": 1})]
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
Positive = Annotated[float, BeforeValidator(_number), AfterValidator(_at_least(0, above=True)), WithJsonSchema(_POSITIVE)]
_PERCENT = {"type": "number", "exclusiveMinimum": 0, "maximum": 100}


def _percent(value: float) -> float:
    if not 0 < value <= 100:
        raise ValueError(f"got {value:.12g}; allowed: a number above 0 and up to 100, in percent")
    return value


Percentile = Annotated[float, BeforeValidator(_number), AfterValidator(_percent), WithJsonSchema(_PERCENT)]
Growth = Annotated[float, BeforeValidator(_number), AfterValidator(_at_least(1)), WithJsonSchema({"type": "number", "minimum": 1})]
_FRACTION = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
Fraction = Annotated[float, BeforeValidator(_number), AfterValidator(_at_least(0, above=True, below=1)), WithJsonSchema(_FRACTION)]


def switch(value: object) -> bool:
    """True or False, in any of YAML's words, quoted or not."""
    words = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
    value = words.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError(refusal(value, "true or false", ("true", "false")))
    return value


Switch = Annotated[bool, BeforeValidator(switch), WithJsonSchema({"type": "boolean"})]


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(refusal(value, "text, in quotes"))
    return value


Text = Annotated[str, BeforeValidator(_text)]


def _format(value: object) -> str:
    """The canonical name. Dicts may hold torch dtypes."""
    if not isinstance(value, str | torch.dtype | formats.Format):
        raise ValueError(refusal(value, f"a format such as {allowed(formats.TABLE)}"))
    try:
        return formats.get(value).name
    except FormatError as error:
        raise ValueError(str(error)) from None


_EXAMPLES = ["e4m3fn", "e5m2", "e4m3b6.5", "ue4m4", "int8", *formats.MX]
Format = Annotated[str, BeforeValidator(_format), WithJsonSchema({"type": "string", "examples": _EXAMPLES})]


def _granularity(value: object) -> Block:
    if isinstance(value, str) and value in ("tensor", "row", "token", "channel"):
        return "tensor" if value == "tensor" else "row"
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return (value[0], value[1])
    if isinstance(value, Mapping) and list(value) == ["group"] and type(size := value["group"]) is int and size > 0:
        return (1, size)
    words = "tensor, row (also token, channel), a group {group: N} or a block [rows, columns], of whole numbers from 1 on"
    raise ValueError(refusal(value, words, ("tensor", "row", "token", "channel")))


_SIDE = {"type": "integer", "minimum": 1}
_BLOCK = {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}
_GROUP = {"type": "object", "properties": {"group": _SIDE}, "required": ["group"], "additionalProperties": False}
_GRANULARITY = {"anyOf": [{"type": "string", "enum": ["tensor", "row", "token", "channel"]}, _GROUP, _BLOCK]}
Granularity = Annotated[Block, BeforeValidator(_granularity), WithJsonSchema(_GRANULARITY)]


def _pattern(value: object) -> str:
    if not isinstance(value, str) or not value or value == "re:":
        raise ValueError(refusal(value, "a name, a glob such as '*.fc', or 're:' and a regular expression, in quotes"))
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"got {shorten(value)}; not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, BeforeValidator(_pattern), WithJsonSchema({"type": "string", "minLength": 1})]


def as_list(value: object) -> object:
    """A single value where a list may stand; nothing at all is an empty list."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


LISTED = BeforeValidator(as_list)


@dataclass(frozen=True)
class Also:
    """In the JSON schema: what a validator accepts beyond the type, or a single entry where the type says a list."""

    schema: dict[str, Any] | None = None

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(core)
        return {"anyOf": [found, found["items"] if self.schema is None else self.schema]}


OR_ONE = Also()
OR_NONE = Also({"enum": ["none", None]})


def field(meaning: str, **keywords: Any) -> Any:
    """A model field with the sentence that the reference table and the JSON schema show."""
    return Field(description=meaning, **keywords)
