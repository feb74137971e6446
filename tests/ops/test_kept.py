"""Saved-tensor hooks that copy, such as save_on_cpu, leave records alone: backward measures into the memory that forward was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.samples import act_linear_args, recorded_args
from torch import Tensor

from fp8fx.ops.casts import RECORD

KEPT = "grad_output=e4m3ieee/current/tensor/nearest_even/saturate;gemms=output,grad_input,grad_weight;columns=yes"


def linear(records: Tensor, args: tuple[Any, ...]) -> Tensor:
    row, _ = torch.unbind(records)
    y: Tensor = torch.ops.fp8fx.linear(*args[:5], row, *args[6:])
    return y


def act_linear(records: Tensor, args: tuple[Any, ...]) -> Tensor:
    y: Tensor = torch.ops.fp8fx.act_linear(*args[:8], *torch.unbind(records), *args[10:])[0]
    return y


CASES = {"linear": (linear, recorded_args(KEPT), 1), "act_linear": (act_linear, act_linear_args("silu", True), 2)}


class Copies:
    """save_on_cpu without a second device: what is saved comes back in other memory."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, saved: Tensor) -> Tensor:
        self.count += 1
        return saved.clone()


@pytest.mark.parametrize("backend", ["", "aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("name", CASES)
def test_backward_measures_into_the_records_of_forward(name: str, backend: str) -> None:
    torch._dynamo.reset()
    function, args, rows = CASES[name]
    run = torch.compile(function, backend=backend, fullgraph=True) if backend else function
    found = []
    for copies in (None, Copies()):
        records = torch.zeros(2, 3, RECORD)
        args[0].grad = None
        with torch.autograd.graph.saved_tensors_hooks(copies or (lambda t: t), lambda t: t):
            y = run(records, args)
        y.backward(torch.ones_like(y))
        assert (records[:rows, 0, 0] > 0).all()
        assert copies is None or copies.count > 0
        found.append((records, args[0].grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
