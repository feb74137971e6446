"""Rounding: how values become codes, as every launcher that casts takes it. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8fx.errors import KernelError


@dataclass(frozen=True)
class Rounding:
    """How values become codes. `rng`: int64 [seed, step, call] on the device; `key`: 32 bits, `fp8fx.numerics.producer_key`."""

    rounding: str = "nearest_even"
    overflow: str = "saturate"
    rng: Tensor | None = None
    key: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest_even", "stochastic") or self.overflow not in ("saturate", "nonfinite"):
            raise KernelError(f"kernels round nearest_even or stochastic and saturate or not, got {self.rounding!r}, {self.overflow!r}")
        if self.rounding == "stochastic" and (self.rng is None or self.rng.dtype != torch.int64):
            raise KernelError("stochastic rounding needs rng: an int64 tensor [seed, step, call]")

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def nonfinite(self) -> bool:
        return self.overflow == "nonfinite"

    @property
    def signed_key(self) -> int:
        """The key as int32, so that every key runs the same compiled kernel."""
        return (self.key & 0xFFFFFFFF) - ((self.key & 0x80000000) << 1)


NEAREST = Rounding()
