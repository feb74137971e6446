"""Real input that is already on the machine: Python's own source text, and scikit-learn's handwritten digits.

Both are deterministic: the same Python (or scikit-learn) version gives the same tensors, and no network is used.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8fx.errors import FP8Error

# Not library source: what users installed, tests, generated tables, and one 700 kB file of help text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_EVERY = 10  # one file of ten is held out: whole files, so that no held-out line was seen next to its neighbours
TRAIN_BYTES = 4_000_000
HELD_OUT_BYTES = 400_000


@dataclass(frozen=True)
class Text:
    """Two streams of bytes as int64 tokens [N]."""

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures [N, 1, 8, 8] float32 in [-1, 1] and their labels [N] int64."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def library_files(root: Path) -> list[Path]:
    """The library's `.py` files below `root`, in an order that does not depend on the file system."""
    files = [path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _joined(files: list[Path], cap: int) -> Tensor:
    """The first `cap` bytes of `files` one after the other, as int64 tokens [N]."""
    text = bytearray()
    for path in files:
        if len(text) >= cap:
            break
        text += path.read_bytes()
    return torch.frombuffer(text[:cap], dtype=torch.uint8).long() if text else torch.empty(0, dtype=torch.int64)


def python_source(root: Path | None = None, train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES) -> Text:
    """The bytes of the standard library's sources, split by file.

    Raises FP8Error where this Python comes without its sources (some embedded builds).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = library_files(root)
    held_out = files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [path for index, path in enumerate(files) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    text = Text(_joined(train, train_bytes), _joined(held_out, held_out_bytes))
    if min(text.train.numel(), text.held_out.numel()) < 4096:
        raise FP8Error(f"the demo reads Python's own sources, but found too few .py files in {root}; use a Python that has them")
    return text


def digits(fold: int = 0, folds: int = 3, seed: int = 0) -> Pictures:
    """scikit-learn's 1,797 handwritten digits, [N, 1, 8, 8] float32 in [-1, 1], as one fold of a cross-validation.

    The pictures are shuffled once with `seed` and cut into `folds` parts of 1/folds each. Part `fold` is held out, the others are for
    training: over all folds every picture is held out exactly once.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FP8Error("the digits demo needs scikit-learn: pip install 'fp8fx[demo]'") from error
    data = load_digits()
    pictures = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = list(order.tensor_split(folds))
    held_out = parts.pop(fold)
    train = torch.cat(parts)
    return Pictures(pictures[train], labels[train], pictures[held_out], labels[held_out])


def text_batches(tokens: Tensor, batch: int, context: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of windows at random places: inputs and next bytes, each [batch, context]."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    for _ in range(steps):
        starts = torch.randint(tokens.numel() - context, (batch, 1), generator=generator)
        rows = tokens[starts + window]
        yield rows[:, :-1], rows[:, 1:]


def text_windows(tokens: Tensor, batch: int, context: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `limit` batches of windows side by side, from places spread evenly over `tokens`; every byte counts once."""
    count = min(limit * batch, (tokens.numel() - 1) // context) // batch * batch
    stride = (tokens.numel() - 1 - context) // max(count - 1, 1)
    starts = torch.arange(count).unsqueeze(1) * stride
    rows = tokens[starts + torch.arange(context + 1)]
    for part in rows.view(-1, batch, context + 1).unbind():
        yield part[:, :-1], part[:, 1:]


def picture_batches(pictures: Pictures, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of training pictures and labels, each batch moved by at most one pixel; epochs are reshuffled."""
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(pictures.train, (1, 1, 1, 1), value=-1.0)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(padded), generator=generator)
        rows, order = order[:batch], order[batch:]
        down, right = (int(v) for v in torch.randint(3, (2,), generator=generator))
        yield padded[rows, :, down : down + 8, right : right + 8], pictures.train_labels[rows]


def picture_windows(pictures: Pictures, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All held-out pictures and labels, in order."""
    for start in range(0, len(pictures.held_out), batch):
        rows = slice(start, start + batch)
        yield pictures.held_out[rows], pictures.held_out_labels[rows]
