"""Looking at quantizations as they run: an observer gets each tensor together with its codes.

Nobody looks in an ordinary step, which pays for one look at an empty list. The reference calls `quantized`, forward and backward, under
every inner compiler, since operators are opaque to them. Kernels do not, and a replayed CUDA graph calls no Python.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fp8fx.spec import TensorSpec

# Called with site, role, the tensor, its codes (same shape), their float32 scale and the spec. Weights have the site that reads them first.
OBSERVERS: list[Callable[[str, str, Tensor, Tensor, Tensor, TensorSpec], None]] = []


def quantized(site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: TensorSpec) -> None:
    for observer in tuple(OBSERVERS):
        observer(site, role, x.detach(), q, scale, spec)
