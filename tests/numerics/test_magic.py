"""The fast form of nearest-even: formats without mantissa bits have it, those at the ends of float32 need not, and all cost the same."""

from __future__ import annotations

import pytest
import torch
from numerics.oracles import all_values, assert_same, decisive, gfloat_round
from torch.fx.experimental.proxy_tensor import make_fx

from fp8fx import formats
from fp8fx.numerics import round_to_format
from fp8fx.numerics.rounding import has_magic
from fp8fx.numerics.specification import round_values

# Biases of both parities: a tie goes to the even code, which counts exponents from the lowest.
POWERS = (
    "e2m0fn",
    "e3m0fn",
    "e4m0fn",
    "e5m0fn",
    "e6m0fn",
    "e7m0fn",
    "e4m0fnuz",
    "e5m0b14fn",
    "e5m0b3fn",
    "e7m0b40fn",
    "e3m0none",
    "ue4m0fn",
    "ue7m0fn",
)
ENDS = (
    "e4m3b-109fn",
    "e4m3b-105fn",
    "e4m3b-95fn",
    "e4m3b-90",
    "e5m2b-90",
    "e3m4b-117fn",
    "e7m0b1fn",
    "ue4m4b-106fn",
    "e4m3b124fn",
    "e5m2b125",
)


@pytest.mark.parametrize("name", [*POWERS, *ENDS])
def test_all_bfloat16_agree_with_gfloat(name: str) -> None:
    x = all_values(torch.bfloat16)
    if not formats.get(name).signed:  # gfloat has no answer for negative numbers there
        x = x[~torch.signbit(x.float())]
    for overflow in ("saturate",) if formats.get(name).nan == "none" else ("saturate", "nonfinite"):
        assert_same(round_to_format(x, name, overflow=overflow), gfloat_round(x, name, "nearest_even", overflow), x)


@pytest.mark.parametrize("name", [*POWERS, *ENDS])
def test_ties_and_their_neighbours_agree_with_the_specification(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = decisive(name, dtype)
        assert_same(round_to_format(x, name), torch.tensor(round_values(x.tolist(), name, "nearest_even", "saturate")), x)


def test_which_form_a_format_takes() -> None:
    assert all(has_magic(formats.get(name), torch.float32) for name in (*POWERS, "e4m3fn", "e5m2", "e6m1", "int8", "e4m3b124fn"))
    assert not any(has_magic(formats.get(name), torch.float32) for name in ("e4m3b-109fn", "e7m0b1fn", "e5m2b-90"))
    assert all(has_magic(formats.get(name), torch.float64) for name in (*POWERS, *ENDS))


def operations(name: str) -> list[str]:
    """The aten operators that rounding to the format is traced to: what Inductor makes one loop of."""
    graph = make_fx(lambda x: round_to_format(x, name))(torch.randn(64)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function" and node.target != torch.ops.aten.detach.default]


def test_no_format_takes_more_operations_than_e4m3fn() -> None:
    """Each of the benchmark's formats (tests/benchmarks/cpu_emulation.py) has e4m3fn's very operations, but for what -0 takes: their times
    are equal whatever a busy machine measures. One without mantissa bits has a few integer operations more."""
    usual = operations("e4m3fn")
    assert 8 <= len(usual) <= 10
    for name in ("e5m2", "e4m3ieee", "e3m4fn", "e2m5", "e3m2", "e6m1", "e1m6none"):
        assert operations(name) == usual, name
    for name in ("e5m2fnuz", "int8"):
        assert len(operations(name)) < len(usual), name
    assert len(usual) < len(operations("e7m0fn")) <= len(usual) + 4
