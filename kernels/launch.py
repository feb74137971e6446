"""launch: how every kernel of this package is started.

    launch(kernel, grid, args, constexprs, num_warps=4, num_stages=3)

A kernel's parameters are its runtime arguments, `args` in order, and then its constexprs, by name. Of the runtime arguments, tensors
come first as pointers; one that the constexprs switch off is never read, and any tensor stands in for it.
"""

from __future__ import annotations

from typing import Any


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> None:
    """Start `kernel` on the current stream of the current device."""
    kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
