"""Writing a text file whole or not at all: beside its place first, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from fp8fx.errors import FP8Error


def check_place(path: str | os.PathLike[str]) -> None:
    """FP8Error for a path where no file can come to lie: known before hours of measuring, not after."""
    target = Path(os.path.realpath(path))
    problem = "it is a directory" if target.is_dir() else "" if target.parent.is_dir() else f"there is no folder {str(target.parent)!r}"
    if problem:
        raise FP8Error(f"{os.fspath(path)}: cannot be written: {problem}. Name a file in a folder that is there")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8. If anything goes wrong, FP8Error, and what was at `path` is there still, whole."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is a directory or no regular file")
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except OSError as error:
        raise FP8Error(f"{os.fspath(path)}: cannot be written: {error.strerror or error}. Nothing was changed there") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
