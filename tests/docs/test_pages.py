"""The pages of docs/ say what the code does: listings are those of today, and example code runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from docs.generate_pipeline import PAGE, generate

from fp8fx import pipeline

DOCS = PAGE.parent


def test_pipeline_listings_are_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert generate(page) == page, "run python tests/docs/generate_pipeline.py, and read what changed"


def test_pipeline_page_has_every_stage() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [stage for stage in pipeline.STAGES if f"<!-- Block hybrid {stage} -->" not in page] == []


def test_writing_a_pass_runs_as_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All Python blocks of the page, one after the other in one namespace; what they print is what the page shows."""
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)  # restored afterwards: the page adds a pass
    monkeypatch.setattr(pipeline, "STAGES", pipeline.STAGES)
    page = (DOCS / "writing-a-pass.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    module = types.ModuleType("writing_a_pass")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # TorchDynamo looks up a function's globals by their module
    for block in blocks:
        exec(compile(block, "docs/writing-a-pass.md", "exec", dont_inherit=True), vars(module))
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == "".join(shown)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"
