"""What of a recipe no kernel has. *annotate* asks for the plan and *lower* before it rewrites: such a layer is left to the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fp8fx.ops.inductor import FORMATS
from fp8fx.spec import ACCUMULATORS, GEMMS, ROLES, SiteSpec, TensorSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # each holds every value of FORMATS
ROUNDINGS = ("nearest_even", "stochastic")
LEAST_SIDE = 32  # of a block along the contraction


def obstacle(spec: SiteSpec, input: TensorSpec | None, weight: TensorSpec | None, dim: int, dtypes: Sequence[torch.dtype]) -> str:
    """Why the reference must run a linear layer; empty if kernels can. dim: dimensions of its input; dtypes: of input and weight."""
    if spec.gemms != GEMMS or spec.calibrating:
        return "not all of its GEMMs are in FP8"
    if not set(spec.accumulate) <= set(ACCUMULATORS):
        return "its products have an arithmetic of their own"
    if spec.save_for_backward != "fp8":
        return "save_for_backward keeps its input in high precision"
    if spec.grad_output is None or input is None or weight is None:
        return "an operand stays in high precision"
    if not set(dtypes) <= set(DTYPES):
        return "kernels read bfloat16, float16 and float32"
    for role in (input, weight, spec.grad_output):
        if problem := _no_kernel(role):
            return problem
    if dim > 2 and not isinstance(input.granularity, str) and input.granularity[0] > 1:
        return "its input has blocks of several rows, in more than two dimensions"
    rounded = [role for role in (spec.grad_input, spec.grad_weight) if role is not None and role.scaling == "delayed"]
    return "a rounded gradient has a delayed scale" if rounded else ""


def only_emulated(spec: SiteSpec) -> bool:
    """It has an arithmetic, formats, roundings or scales that only an emulation has, whatever site it is for: a study of their numbers."""
    roles: list[TensorSpec | None] = [getattr(spec, role) for role in ROLES]
    return spec.arithmetic is not None or any(role is not None and _no_such_numbers(role) for role in roles)


def _no_such_numbers(spec: TensorSpec) -> str:
    """What of a role no kernel has anywhere."""
    if spec.format not in FORMATS:
        return f"{spec.format} is no format of this hardware"
    if spec.rounding not in ROUNDINGS:
        return f"no kernel rounds {spec.rounding}"
    if not spec.on_hardware:
        what = "fixed" if spec.scaling == "fixed" else "e8m0" if spec.scale_format == "e8m0" else f"{spec.statistic} or clipped"
        return f"no kernel makes {what} scales"
    return "" if spec.sides_on_hardware else _no_blocks(spec)


def _no_blocks(spec: TensorSpec) -> str:
    return f"no kernel has blocks of {spec.granularity[0]}x{spec.granularity[1]}"


def _no_kernel(spec: TensorSpec) -> str:
    """What of a role no linear layer's kernels have."""
    block = spec.granularity
    if (problem := _no_such_numbers(spec)) or block == "tensor":
        return problem
    if isinstance(block, str):
        return "" if spec.scaling == "current" else "scales per row are current ones"
    return _no_blocks(spec) if spec.scaling != "current" or block[1] < LEAST_SIDE else ""
