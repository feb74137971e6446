"""The decompositions that Inductor applies for CUDA: the same numbers, in terms that it can place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8fx import numerics
from fp8fx.ops import inductor
from fp8fx.ops.casts import RECORD

ops = torch.ops.fp8fx
SPEC = "e4m3fn/current/tensor/nearest_even/saturate"
OTHER = "e5m2/none/tensor/stochastic/nonfinite"
RNG = torch.tensor([3, 1, 4])


class Elsewhere(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def elsewhere(x: Tensor) -> Tensor:
    return x.as_subclass(Elsewhere)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["rows", "transposed", "both"])
def test_the_amax_of_an_activation_is_a_reduction_of_its_own(dtype: torch.dtype, layout: str) -> None:
    x = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[1, 2, 3:5] = torch.tensor([math.inf, math.nan])
    assert float(inductor.row_amax(x)) == float(numerics.amax(x))
    records = torch.zeros(2, RECORD)
    tail = (SPEC, None, "fc", "grad_output")
    ours = inductor._cast_current(elsewhere(x), *tail, records[0], layout)
    theirs = ops.cast_current(x, *tail, records[1], layout)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.float().nan_to_num(7.0), b.float().nan_to_num(7.0))
    assert torch.equal(records[0], records[1])


def test_what_keeps_its_own_amax_kernel() -> None:
    x = elsewhere(torch.ones(4, 8))
    rows = SPEC.replace("tensor", "row")
    for given, spec, role in ((x, SPEC, "weight"), (x, rows, "input"), (x.half(), SPEC, "input"), (x[:0], SPEC, "input")):
        assert inductor._cast_current(given, spec, None, "fc", role, None, "rows") is NotImplemented
    assert inductor._cast_current(torch.ones(4, 8), SPEC, None, "fc", "input", None, "rows") is NotImplemented


@pytest.mark.parametrize("output", ["", f"output={OTHER};"])
def test_a_linear_that_cublas_does_not_have_is_a_product_without_anchors(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """e5m2 x e5m2: the codes are multiplied, with the ending that the site's output asks for; x and w are not read."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, w, one = torch.randn(2, 3, 16), torch.randn(32, 16), torch.ones(())
    codes = [x.to(torch.float8_e5m2), one], [w.to(torch.float8_e5m2), one]
    backward = f"{output}grad_output={OTHER};gemms=output,grad_input,grad_weight;columns=yes"
    tail = (None, None, RNG, "fc", OTHER, OTHER, backward, torch.bfloat16)
    ours = inductor._linear(elsewhere(torch.full_like(x, math.nan)), torch.full_like(w, math.nan), None, *codes, *tail)
    assert torch.equal(ours, ops.linear(x, w, None, *codes, *tail))


@pytest.mark.parametrize(
    ("m", "n", "k", "rows", "accumulate", "theirs"),
    [
        (8192, 4096, 4096, False, "precise", True),
        (8192, 4096, 512, False, "precise", False),
        (8192, 4096, 512, False, "fast", True),
        (8192, 4096, 2048, True, "precise", False),
        (8192, 4096, 4096, True, "precise", True),
        (64, 65536, 256, False, "precise", True),  # few rows
        (1024, 1024, 256, False, "precise", True),  # few tiles
        (65536, 64, 512, True, "precise", True),  # few columns
        (8192, 4096, 16, False, "precise", True),  # next to nothing to contract
        (16, 4096, 4096, True, "fast", False),  # few rows, with scales of their own
        (17, 4096, 4096, True, "fast", True),
        (16, 4096, 4096, False, "fast", True),
    ],
)
def test_whose_product_runs(m: int, n: int, k: int, rows: bool, accumulate: str, theirs: bool) -> None:
    a, b = (torch.empty(size, k, dtype=torch.float8_e4m3fn, device="meta") for size in (m, n))
    scale_a, scale_b = (torch.empty(shape, device="meta") for shape in (((m, 1), (1, n)) if rows else ((), ())))
    assert inductor.torch_has(a, scale_a, b.t(), scale_b, None, torch.bfloat16, False, accumulate) is theirs


def test_whose_product_runs_is_not_asked_of_symbols() -> None:
    """The answer would tie a number of rows to one side of a limit, and the graph with it."""
    asked: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        a = next(x for x in values if isinstance(x, Tensor))
        one, b = torch.empty((), device="meta"), torch.empty(4096, 512, dtype=torch.float8_e4m3fn, device="meta").t()
        asked.append((a.shape[0], inductor.torch_has(a, one, b, one, None, torch.bfloat16, False, "precise")))
        return graph

    torch.compile(lambda x: x.view(torch.uint8) + 1, backend=backend, dynamic=True)(torch.empty(8192, 512, dtype=torch.float8_e4m3fn))
    ((rows, theirs),) = asked
    assert not isinstance(rows, int)
    assert theirs


@pytest.mark.parametrize(("major", "theirs"), [(8, True), (9, False), (10, True), (12, True)])
def test_whose_product_runs_on_other_gpus(monkeypatch: pytest.MonkeyPatch, major: int, theirs: bool) -> None:
    """Measured on Hopper, and written for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 9))
    a, b = (elsewhere(torch.empty(size, 512, dtype=torch.float8_e4m3fn)) for size in (8192, 1024))
    one = torch.ones(())
    assert inductor.torch_has(a, one, b.t(), one, None, torch.bfloat16, False, "precise") is theirs
