"""insert_qdq, cancel, fuse and lower give the same bits: outputs and gradients, over operations and recipes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate.stages import assert_same_bits, run_stages
from passes.models import SINGLE, TOGETHER

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CASES = SINGLE | TOGETHER
ROWS = {"granularity": "row"}
RECIPES: dict[str, Any] = {
    "hybrid": "hybrid",
    "direct": "direct",
    "emulation-hybrid": "emulation-hybrid",
    "emulation-direct": "emulation-direct",
    "rowwise": "rowwise",
    "blockwise": "blockwise",
    "rows": {"extends": "hybrid", "defaults": {"input": ROWS, "weight": ROWS, "grad_output": ROWS}},
    "blocks": {
        "extends": "hybrid",
        "defaults": {"input": {"granularity": [1, 4]}, "weight": {"granularity": [4, 4]}, "grad_output": {"granularity": [1, 4]}},
    },
    "random": {"extends": "hybrid", "defaults": {"rounding": "stochastic"}},
    "emulated formats": {"extends": "hybrid", "defaults": {"input": {"format": "e3m4fn"}, "weight": {"format": "e2m5"}}},
    "kept": {"extends": "direct", "defaults": {"save_for_backward": "high_precision"}},
    "attention": {"extends": "hybrid", "defaults": {"attention": "emulate"}},
}


def inputs_of(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in CASES[name][1]())


def check(name: str, recipe: str, dtype: torch.dtype = torch.float32) -> None:
    model = CASES[name][0]().to(dtype)
    assert_same_bits(run_stages(model, RECIPES[recipe], inputs_of(name, dtype)))


def gradients_exist(name: str) -> bool:
    """`run_stages` needs something to differentiate."""
    return any(True for _ in CASES[name][0]().parameters())


OTHER_ACTIVATIONS = ("feed tanh gelu", "feed relu", "feed silu")
WITH_PARAMETERS = [name for name in CASES if gradients_exist(name)]


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
def test_every_operation(name: str, recipe: str) -> None:
    check(name, recipe)


@pytest.mark.parametrize("name", [name for name in TOGETHER if name in WITH_PARAMETERS and name not in OTHER_ACTIVATIONS])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("hybrid", "direct")])
def test_operations_that_meet(name: str, recipe: str) -> None:
    check(name, recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize("name", ["shared", "chain", "chain through shapes", "feed gelu", "attention", "conv and norm"])
def test_other_dtypes(name: str, recipe: str, dtype: torch.dtype) -> None:
    check(name, recipe, dtype)


@pytest.mark.parametrize("recipe", ["hybrid", "direct"])
@pytest.mark.parametrize("name", ["shared", "feed gelu", "attention"])
def test_under_autocast(name: str, recipe: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(name, recipe)
