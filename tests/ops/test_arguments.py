"""NamedTuples of an operator's arguments: the schema that is written from them, and functions that take them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fp8fx.ops.arguments import signature, takes


class First(NamedTuple):
    x: Tensor
    block: list[int]
    dtype: torch.dtype
    accumulate: str = "precise"


class Second(NamedTuple):
    scale: Tensor | None
    codes: list[Tensor]
    eps: float
    sums: bool


@takes(First, Second)
def both(first: First, second: Second) -> tuple[object, ...]:
    return first.accumulate, second.sums


def test_signature() -> None:
    assert signature(First) == "Tensor x, int[] block, ScalarType dtype, str accumulate='precise'"
    first = "Tensor x, int[] block, ScalarType dtype, str accumulate"  # what follows has no default
    assert signature(First, Second) == f"{first}, Tensor? scale, Tensor[] codes, float eps, bool sums"


def test_takes() -> None:
    first, second = First(torch.ones(1), [], torch.float32, "fast"), Second(None, [], 1e-5, True)
    assert both(*first, *second) == ("fast", True)
    assert takes(First)(lambda first: first.accumulate)(*first[:3]) == "precise"  # torch leaves out what has its default


def test_takes_neither_more_nor_fewer() -> None:
    first, second = First(torch.ones(1), [], torch.float32), Second(None, [], 1e-5, True)
    with pytest.raises(TypeError):
        both(*first, *second, None)
    with pytest.raises(TypeError):
        both(*first, *second[:3])
