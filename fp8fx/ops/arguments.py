"""The arguments of an operator that has many, as a NamedTuple on its page: its schema is written from it, its implementations take it.

    class ScaledMM(NamedTuple): ...

    @takes(ScaledMM)
    def scaled_mm_reference(mm: ScaledMM) -> Tensor: ...

    define(f"scaled_mm({signature(ScaledMM)}) -> Tensor", scaled_mm_reference, ...)

So the list stands in one place, and the reference and the implementations for devices cannot differ in the order of its names.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# As a schema writes the types that a NamedTuple of arguments has.
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[int]: "int[]", str: "str", float: "float", bool: "bool",
    torch.dtype: "ScalarType",
}  # fmt: skip


def signature(*kinds: type[Any]) -> str:
    """The fields of these NamedTuples, one after the other, as a schema lists arguments; defaults of the last one only, as torch has it."""
    written = []
    for kind in kinds:
        defaults = kind._field_defaults if kind is kinds[-1] else {}
        types = typing.get_type_hints(kind)
        written += [f"{_TYPES[types[f]]} {f}" + (f"={defaults[f]!r}" if f in defaults else "") for f in kind._fields]
    return ", ".join(written)


def takes(*kinds: type[Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A function of these NamedTuples, to be called as the operator is: with their fields, one after the other."""
    ends = [sum(len(kind._fields) for kind in kinds[: i + 1]) for i in range(len(kinds))]
    parts = list(zip(kinds, [0, *ends[:-1]], [*ends[:-1], None], strict=True))

    def wrap(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(*args: Any) -> Result:
            # Layers call this many times in a step, and the making of a NamedTuple that knows defaults takes several times as long.
            if len(args) != ends[-1]:
                return function(*[kind(*args[start:end]) for kind, start, end in parts])
            if len(parts) == 1:
                return function(tuple.__new__(kinds[0], args))
            return function(*[tuple.__new__(kind, args[start:end]) for kind, start, end in parts])

        return run

    return wrap
