"""Every error fp8fx raises on purpose. First in the import order: imports nothing of the project.

    FP8Error
    ├── FormatError      (ValueError)    an unknown or ambiguous number format, rounding mode or overflow policy
    ├── RecipeError      (ValueError)    a recipe that cannot be read, or that asks for something impossible
    ├── CaptureError     (RuntimeError)  the model could not be turned into a graph; the model is untouched
    ├── PassError        (RuntimeError)  a pass broke its own contract: a bug in fp8fx or in a user's pass
    ├── KernelError      (RuntimeError)  a kernel could not be built or launched
    ├── ModelError       (TypeError)     a model, or arguments, that fp8fx.compile cannot take
    └── CheckpointError  (ValueError)    a checkpoint that cannot be written or read, or that does not fit; nothing is changed

A message says what was wrong, where (file, line, layer), what is allowed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FP8Error(Exception):
    """Base class: `except fp8fx.FP8Error` catches everything fp8fx raises on purpose."""


class FormatError(FP8Error, ValueError):
    """An unknown or ambiguous number format, rounding mode or overflow policy."""


class RecipeError(FP8Error, ValueError):
    """A recipe that cannot be read, or that asks for something impossible."""


class CaptureError(FP8Error, RuntimeError):
    """The model could not be turned into a graph. The model passed in is untouched."""


class PassError(FP8Error, RuntimeError):
    """A pass broke its own contract."""


class KernelError(FP8Error, RuntimeError):
    """A kernel could not be built or launched."""


class ModelError(FP8Error, TypeError):
    """A model, or arguments, that fp8fx cannot take."""


class CheckpointError(FP8Error, ValueError):
    """A checkpoint that cannot be written or read, or that does not fit. The model, its state and the file that was there are as before."""


class FP8Warning(UserWarning):
    """Category of every warning fp8fx gives."""


def nearest(name: object, known: Iterable[str]) -> str:
    """A " Did you mean 'x'?" for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def allowed(names: Iterable[str]) -> str:
    """`a, b or c`, for the part of a message that lists what may be written."""
    words = list(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
