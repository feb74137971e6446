"""Where statistics go: a file of JSON lines, TensorBoard.

A step's lines are handed to the system in one write, and none is held back: a process that is killed leaves whole lines. What a full disk
or a power failure cut off is removed when the file is opened again; until then a reader knows it by the missing end of line.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8fx.errors import FP8Error, FP8Warning, ModelError
from fp8fx.tally import Figures

START = b'{"step": '  # of every line


@dataclass(frozen=True)
class Record:
    """One tensor's figures in one step."""

    step: int
    layer: str
    role: str
    figures: Figures

    def line(self) -> str:
        """JSON. Shares are null where nothing was counted; scale_min is there where a tensor has several scales."""
        f = self.figures
        several = {} if f.scale_min == f.scale else {"scale_min": f.scale_min}
        head = {"step": self.step, "layer": self.layer, "role": self.role, "format": f.format}
        return json.dumps({**head, "amax": f.amax, "scale": f.scale, **several, "underflow": f.underflow, "overflow": f.overflow}) + "\n"

    def scalars(self) -> dict[str, float]:
        """TensorBoard's tag -> value."""
        f = self.figures
        values = {"amax": f.amax, "scale": f.scale, "underflow": f.underflow, "overflow": f.overflow}
        return {f"fp8/{self.layer}/{self.role}/{name}": value for name, value in values.items() if value is not None}


class JsonLines:
    """A file, created with its folder, to which whole lines are added."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise FP8Error(
                f"statistics cannot be written to {str(self.path)!r}: {error.strerror or error}. Give jsonl= a file that can be written, "
                "in a folder that can be made"
            ) from error
        self._heal()

    def _heal(self) -> None:
        """End the last line: cut away one of ours that is not whole, and complete one that is somebody else's."""
        content_end = os.fstat(self._file).st_size
        tail = b""
        while content_end and b"\n" not in tail:
            start = max(0, content_end - 65536)
            tail = os.pread(self._file, content_end - start, start) + tail
            content_end = start
        last = tail.rpartition(b"\n")[2]
        if last and START.startswith(last[: len(START)]):
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(last))
        elif last:
            os.write(self._file, b"\n")

    def write(self, records: list[Record]) -> None:
        """All lines of a step. A full disk does not end a training: it warns, and leaves the file as it was."""
        data = "".join(record.line() for record in records).encode()
        before = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, before)
            warnings.warn(
                f"fp8fx: the statistics of step {records[0].step} could not be written to {str(self.path)!r}: {error.strerror or error}. "
                "Training goes on without them.",
                FP8Warning,
                stacklevel=4,
            )

    def close(self) -> None:
        os.close(self._file)


class TensorBoard:
    """A SummaryWriter of torch's, or one made for a folder, which is closed at the end."""

    def __init__(self, target: Any) -> None:
        self._own = isinstance(target, (str, os.PathLike))
        if not self._own and not callable(getattr(target, "add_scalar", None)):
            raise ModelError(f"tensorboard is a folder or a SummaryWriter (something with add_scalar), got {type(target).__name__}")
        self._writer = _summary_writer(os.fspath(target)) if self._own else target

    def write(self, records: list[Record]) -> None:
        for record in records:
            for tag, value in record.scalars().items():
                self._writer.add_scalar(tag, value, record.step)
        if callable(flush := getattr(self._writer, "flush", None)):
            flush()

    def close(self) -> None:
        if self._own:
            self._writer.close()


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FP8Error(
            "statistics for TensorBoard need the package tensorboard, which is not installed: pip install tensorboard, or "
            "'fp8fx[trainers]'; or write JSON lines, with jsonl=<file>"
        ) from error
    try:
        return SummaryWriter(folder)
    except OSError as error:
        raise FP8Error(f"statistics cannot be written to the folder {folder!r}: {error.strerror or error}") from error
