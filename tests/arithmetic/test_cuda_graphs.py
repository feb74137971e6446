"""Inside of a CUDA graph tables must be there already, and nothing may be asked of the device. The flag of the capture is set by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fp8fx
from fp8fx import arithmetic, inner
from fp8fx.arithmetic import multiplier, operands
from fp8fx.arithmetic.multiplier import checked, mitchell
from fp8fx.arithmetic.product import form_of, prepare, product
from fp8fx.arithmetic.spec import Arithmetic
from fp8fx.errors import ModelError
from fp8fx.numerics.eager import capturing

CPU = torch.device("cpu")
MANTISSAS = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) + 1
CODES = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)).round(decimals=2)
CASES = {
    "factored": "operands=e5m2/multiplier=mitchell",
    "mitchell": "multiplier=mitchell/accumulate=float16",
    "mantissas": "multiplier=graph_mantissas",
    "codes": "operands=e4m3fn/multiplier=graph_codes",
    "hopper": "accumulate=hopper_fast",
}


@pytest.fixture(autouse=True)
def tables() -> None:
    arithmetic.register("graph_mantissas", MANTISSAS)
    arithmetic.register("graph_codes", CODES, format="e4m3fn")


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (multiplier, operands):
        monkeypatch.setattr(module, "capturing", lambda device: True)


def test_only_a_gpu_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda flag=flag: flag)
        assert capturing(torch.device("cuda", 0)) is flag
        assert not capturing(CPU)


def test_a_table_is_not_made_inside_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    late = checked("late", MANTISSAS[:8, :8])
    with monkeypatch.context() as inside:
        capture(inside)
        with pytest.raises(ModelError, match=r"multiplier late: its table is not on cpu yet, .* run the product once before the capture"):
            late.table_on(CPU)
    table = late.table_on(CPU)
    capture(monkeypatch)
    assert late.table_on(CPU) is table
    with pytest.raises(ModelError, match="not on cpu yet"):
        checked("codes", CODES, "e4m3fn").table_on(CPU, "e4m3fn")
    few = checked("few", mitchell(2).table)
    with pytest.raises(ModelError, match="not on cpu yet"):
        few.factors_on(CPU)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_has_the_bits_of_a_call(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tables prepared; for finite operands, and for inf and NaN, which a replay may read where the capture read none."""
    how = Arithmetic.parse(CASES[case])
    torch.manual_seed(0)
    a, b = torch.randn(5, 40), torch.randn(40, 7)
    special = a.clone()
    special[1, 3], special[2, 5] = math.inf, math.nan
    outside = [product(x, b, how) for x in (a, special)]
    capture(monkeypatch)
    for x, y in zip((a, special), outside, strict=True):
        assert torch.equal(product(x, b, how).view(torch.int32), y.view(torch.int32))


def test_prepare_makes_what_the_products_read(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = set()
    for case in ("factored", "codes", "mantissas"):
        how = Arithmetic.parse(CASES[case])
        made = how.table(2 if case == "factored" else None)
        assert made is not None
        made._copies.clear()
        prepare(how, {"", "e4m3fn", "e5m2"}, CPU)
        kept = dict(made._copies)
        assert kept
        with monkeypatch.context() as inside:
            capture(inside)
            product(torch.randn(3, 9), torch.randn(9, 4), how)
        assert made._copies == kept
        forms.add(form_of(how))
    assert forms == {"factored", "tiles"}
    prepare("accumulate=float16", {"e5m2"}, CPU)  # no table, nothing to make


def test_the_inner_compiler_knows_which_tables_a_model_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = str(tmp_path / "few.npy")
    numpy.save(table, MANTISSAS[:4, :4].numpy())
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    recipe = {
        "extends": "hybrid",
        "rules": [
            {"match": "0", "arithmetic": {"multiplier": table, "gradients": "same"}},
            {"match": "2", "arithmetic": {"multiplier": "mitchell"}},
        ],
    }
    fast = fp8fx.compile(model, recipe, inner="eager")
    fast(torch.randn(4, 16))
    found = inner._arithmetics(fast.graph("lower"))
    assert {Arithmetic.parse(text).multiplier for text in found} - {"exact"} == {table, "mitchell"}
    assert all({"", "e4m3fn", "e5m2"} == formats for formats in found.values())
    asked: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(inner, "prepare", lambda text, formats, device: asked.append((text, device)))
    monkeypatch.setattr(inner, "triton_works", lambda: False)
    with FakeTensorMode():
        on_gpu = torch.empty(4, 16, device="cuda:0")
    inner._make_constants(fast.graph("lower"), [torch.ones(1), on_gpu, 3])
    assert asked == [(text, torch.device("cuda", 0)) for text in found]
