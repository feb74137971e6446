"""Tables of products: what is refused, what Mitchell's table says, and tables as float products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fp8fx.arithmetic import mitchell_table, register
from fp8fx.arithmetic.multiplier import MOST_TERMS, TOLERANCE, checked, find, mitchell
from fp8fx.errors import ModelError


def test_mitchell() -> None:
    """1962: at most 1/9 too small, where both fractions are 1/2; exact where one is 0."""
    table = mitchell_table(7).double()
    significand = 1 + torch.arange(128, dtype=torch.float64) / 128
    relative = 1 - table / (significand[:, None] * significand)
    assert float(relative.min()) == 0.0
    assert float(relative.max()) == pytest.approx(1 / 9)
    assert torch.equal(table[0], significand)
    assert relative.argmax() == 64 * 128 + 64


@pytest.mark.parametrize("bits", range(8))
def test_factors_by_rows_are_the_table(bits: int) -> None:
    factors = mitchell(bits).factors
    if factors is None:
        assert bits > 4
        return
    assert factors.bound == 0.0
    assert torch.equal(factors.left.double() @ factors.right.double(), mitchell_table(bits).double())
    assert ((factors.left != 0).sum(1) == 1).all() or ((factors.right != 0).sum(0) == 1).all()


def test_factors_by_rank_keep_their_bound() -> None:
    """An exact product has rank 1; with a smooth error added, rank 3: fewer terms than its 128 rows."""
    s = 1 + torch.arange(128, dtype=torch.float64) / 128
    table = s[:, None] * s - 0.01 * (s[:, None] - 1) * (2 - s) + 0.003 * (s[:, None] ** 2 - 1) * (s**2 - 1)
    for given, terms in ((s[:, None] * s, 1), (table, 3)):
        factors = checked("smooth", given.float()).factors
        assert factors is not None
        assert factors.terms == terms
        error = (given.float().double() - factors.left.double() @ factors.right.double()).abs().max()
        assert float(error) <= factors.bound <= TOLERANCE * 4
    few = checked("truncated", (s[:, None] * s).float()[torch.arange(128) // 32 * 32]).factors
    assert few is not None
    assert few.terms == 1
    torch.manual_seed(0)
    assert checked("rough", torch.rand(128, 128) + 1).factors is None
    assert MOST_TERMS < 128


NAN = torch.ones(8, 8)
NAN[2, 3] = float("nan")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(3, 3), r"shape \[3, 3\]; allowed: \[n, n\] with n = 1, 2, 4, 8, 16, 32, 64, 128 .* \[256, 256\]"),
        (torch.ones(8, 4), r"shape \[8, 4\]"),
        (torch.ones(512, 512), r"shape \[512, 512\]"),
        (torch.ones(8), r"shape \[8\]"),
        (torch.ones(0, 0), r"shape \[0, 0\]"),
        (NAN, r"entry \[2, 3\], nan, is not a number"),
        (torch.full((8, 8), float("inf")), r"entry \[0, 0\], inf, is not a number"),
        (torch.ones(8, 8, dtype=torch.complex64), "table of torch.complex64; allowed: float or integer"),
        (torch.ones(8, 8, dtype=torch.bool), "table of torch.bool"),
        (torch.full((8, 8), 0.1, dtype=torch.float64), "is not a float32 number: round the table first"),
        (torch.full((8, 8), 64), r"64, lies outside \[0, 8\].*divide integer products by 4\^m"),
        (numpy.array([["a"]]), "not a table of numbers"),
        ([[1.0, 2.0], [3.0]], "not a table of numbers"),
        ("mitchell", "a table is a tensor, an array or nested lists"),
    ],
)
def test_wrong_tables(table: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        checked("mine", table)


def test_files_and_names(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    numpy.save(path, mitchell_table(3).numpy())
    assert torch.equal(find(str(path)).table, mitchell_table(3))
    with pytest.raises(ModelError, match=r"no file .*missing.npy: a multiplier's table is a .npy file"):
        find(str(tmp_path / "missing.npy"))
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(ModelError, match="cannot be read as a table"):
        find(str(tmp_path / "text.npy"))
    with pytest.raises(ModelError, match=r"unknown multiplier 'mitchel'; allowed: exact, mitchell.*Did you mean 'mitchell'"):
        find("mitchel")
    assert register("test_files", mitchell_table(2)) is register("test_files", mitchell_table(2))
    with pytest.raises(ModelError, match="is registered already, with another table"):
        register("test_files", mitchell_table(3))
    with pytest.raises(ModelError, match="a multiplier's name is an identifier"):
        register("exact", mitchell_table(3))
