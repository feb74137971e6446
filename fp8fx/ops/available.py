"""Has this machine kernels, and has a GPU FP8 instructions? Where not, operators run their references."""

from __future__ import annotations

import functools
import importlib.util
import warnings

from fp8fx.errors import FP8Warning

CAPABILITY = (8, 9)  # the first with FP8 matrix instructions


def no_kernels(device_name: str = "", capability: tuple[int, int] | None = None) -> str:
    """Why the GPU of this name runs no FP8 kernels; empty if it does. capability: None where no GPU was asked (a plan without one)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if capability is not None and capability < CAPABILITY:
        return f"{device_name} has no FP8 matrix instructions (compute capability 8.9 or later)"
    return _broken()


def triton_works() -> bool:
    return importlib.util.find_spec("triton") is not None and not _broken()


@functools.cache
def _broken() -> str:
    """What the import of the kernels, and of Triton with them, raises, which may be anything; empty if nothing. Said once."""
    try:
        import fp8fx.ops.cuda  # noqa: F401
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        problem = f"Triton is installed and cannot be imported ({type(error).__name__}: {first})"
        warnings.warn(
            f"fp8fx: {problem}: on a GPU, layers stay in high precision or run the reference, which is slow. Install the version of Triton "
            "that torch asks for.",
            FP8Warning,
            stacklevel=2,
        )
        return problem
    return ""
