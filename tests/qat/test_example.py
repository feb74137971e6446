"""The example runs, in its small form."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def test_digits_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ptq_qat_digits.py"))
    example["main"](tiny=True)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("E5M2", "INT8"))]
    assert [row[:2] for row in rows] == [["E5M2", "tensor"], ["E5M2", "channel"], ["INT8", "tensor"], ["INT8", "channel"]]
    moved = {(row[0], row[1]): float(row[4]) for row in rows}
    assert moved["INT8", "tensor"] > moved["E5M2", "tensor"] + 6
