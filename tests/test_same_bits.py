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


def every(overflow: str = "saturate", **role: Any) -> dict[str, Any]:
    """hybrid with the keys of `role` in each of its roles."""
    return {"extends": "hybrid", "defaults": {"input": role, "weight": role, "grad_output": {**role, "overflow": overflow}}}


FIXED = {"scaling": "fixed", "max_value": 3.0}
STUDIES: dict[str, Any] = {
    "mxfp8": every(format="mxfp8_e4m3"),
    "mxfp4": every(format="mxfp4"),
    "ragged groups": every(format="int4", granularity={"group": 3}, statistic="mse"),
    "int8 rows": every(format="int8", granularity="row", statistic="mean", clip=4.0),
    "fractional bias": every(format="e4m3b6.5", statistic="percentile", percentile=99.0),
    "unsigned": {"extends": "hybrid", "defaults": {"weight": {"format": "ue4m4"}}},
    "fixed": every("nonfinite", format="e3m4fn", **FIXED),
    "fixed, all roles": {"extends": "direct", "defaults": dict.fromkeys(("input", "weight", "output", "grad_input", "grad_weight"), FIXED)},
    "random integers": {**every(format="int5"), "rules": [{"match": "*", "rounding": "stochastic"}]},
}
RECIPES |= STUDIES


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
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("hybrid", "direct", *STUDIES)])
def test_operations_that_meet(name: str, recipe: str) -> None:
    check(name, recipe)


@pytest.mark.parametrize("name", ["shared", "chain through shapes", "feed gelu", "attention", "conv and norm"])
@pytest.mark.parametrize("recipe", STUDIES)
def test_formats_and_scales_that_are_emulated(name: str, recipe: str) -> None:
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
