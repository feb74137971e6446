from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8fx.demo import data
from fp8fx.errors import FP8Error


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small `stdlib`: 20 modules, and what must be left out."""
    for index in range(20):
        (tmp_path / f"m{index:02}.py").write_text(f"{index:02}" * 600)
    for folder in ("site-packages/x", "test", "pkg/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "skipped.py").write_text("!" * 5000)
    (tmp_path / "pkg" / "inner.py").write_text("p" * 1200)
    return tmp_path


def test_library_files_are_sorted_and_skip_what_is_not_library_source(library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in data.library_files(library)]
    assert names == [*(f"m{index:02}.py" for index in range(20)), "pkg/inner.py"]


def test_text_is_split_by_file(library: Path) -> None:
    for index in range(20, 60):
        (library / f"m{index}.py").write_text(f"{index}" * 600)
    text = data.python_source(library, train_bytes=50_000, held_out_bytes=5_000)
    as_text = bytes(text.held_out.tolist()).decode()
    assert as_text.startswith("09" * 600 + "19" * 600)
    assert "09" * 600 not in bytes(text.train.tolist()).decode()
    assert (len(text.train), len(text.held_out)) == (50_000, 5_000)


def test_python_source_is_the_same_twice_and_is_source() -> None:
    first, second = (data.python_source(train_bytes=300_000, held_out_bytes=20_000) for _ in range(2))
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    assert "\ndef " in bytes(first.train.tolist()).decode(errors="replace")
    assert first.train.dtype == torch.int64
    assert first.train.max() < 256


def test_a_python_without_sources_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FP8Error, match="use a Python that has them"):
        data.python_source(tmp_path)


def test_text_batches_are_next_byte_pairs_and_depend_on_the_seed_only() -> None:
    tokens = torch.arange(1000) % 256
    batches = list(data.text_batches(tokens, batch=4, context=8, steps=3, seed=1))
    again = list(data.text_batches(tokens, batch=4, context=8, steps=3, seed=1))
    other = list(data.text_batches(tokens, batch=4, context=8, steps=3, seed=2))
    assert len(batches) == 3
    for (inputs, labels), (same, _), (different, _) in zip(batches, again, other, strict=True):
        assert torch.equal((inputs + 1) % 256, labels)
        assert torch.equal(inputs, same)
        assert not torch.equal(inputs, different)


def test_text_windows_do_not_overlap() -> None:
    windows = list(data.text_windows(torch.arange(1000), batch=4, context=8, limit=5))
    inputs = torch.cat([rows for rows, _ in windows])
    assert inputs.shape == (20, 8)
    assert inputs.flatten().unique().numel() == inputs.numel()


def test_digits_are_split_without_overlap_and_the_same_twice() -> None:
    first, second = data.digits(), data.digits()
    assert torch.equal(first.held_out, second.held_out)
    assert first.train.shape == (1198, 1, 8, 8)
    assert first.held_out.shape == (599, 1, 8, 8)
    assert first.train.min() == -1
    assert first.train.max() == 1
    assert first.held_out_labels.bincount().min() > 40


def test_folds_hold_out_every_picture_once_and_train_on_the_others() -> None:
    folds = [data.digits(fold, folds=4) for fold in range(4)]
    assert [len(pictures.held_out) for pictures in folds] == [450, 449, 449, 449]
    everything = torch.cat([pictures.held_out for pictures in folds]).flatten(1).sort(dim=0).values
    for pictures in folds:
        both = torch.cat([pictures.train, pictures.held_out])
        assert torch.equal(both.flatten(1).sort(dim=0).values, everything)
        assert len(pictures.train) == len(pictures.train_labels)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(FP8Error, match=r"pip install 'fp8fx\[demo\]'"):
        data.digits()


def test_picture_batches_cover_an_epoch_and_keep_the_shape() -> None:
    pictures = data.Pictures(torch.zeros(10, 1, 8, 8), torch.arange(10), torch.zeros(5, 1, 8, 8), torch.arange(5))
    batches = list(data.picture_batches(pictures, batch=5, steps=4, seed=0))
    assert all(rows.shape == (5, 1, 8, 8) for rows, _ in batches)
    for epoch in (batches[:2], batches[2:]):
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(10))
    assert [len(labels) for _, labels in data.picture_windows(pictures, 2)] == [2, 2, 1]
