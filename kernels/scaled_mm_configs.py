"""Tile sizes and launch options of scaled_mm, chosen by shape from a short table: no tuning when it runs. Measured: docs/log.md."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fp8fx.errors import KernelError
from fp8fx.kernels.interpret import INTERPRET
from fp8fx.kernels.launch import NO_GPU
from fp8fx.kernels.layout import cdiv

SHARED_MEMORY = 226 * 1024  # bytes of a multiprocessor that programs can have, less what barriers take


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options, chosen by shape from the table below."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    halves: bool
    flatten: bool
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 1  # programs; two hide each other's epilogues where registers and shared memory hold both
    # scaled_mm_specialized: a warpgroup for each 64 rows, num_warps the first's, and a warp that loads; neither halves nor flatten.
    specialized: bool = False

    def stages(self, block_k: int, output_bytes: int, room: int, stochastic: bool = False) -> int:
        """As many as fit into shared memory beside `room` elements of the output: in float32 they are twice as large. Random bits, 4 bytes
        each, are exchanged between threads in two turns."""
        tile, step = room * (output_bytes + 2 * stochastic), (self.block_m + self.block_n) * block_k
        return max(2, min(self.num_stages, (SHARED_MEMORY // self.per_multiprocessor - tile) // step))

    def parts(self, stochastic: bool) -> int:
        """In how many parts a tile is finished. Random bits want registers: then a thread finishes 32 elements at a time."""
        each = self.block_m * self.block_n // (32 * self.num_warps)
        return min(max(each // 32, 1), 4) if stochastic else 2 if self.halves else 1

    @property
    def room(self) -> int:
        """Elements of the output in shared memory, specialized: two parts of 64 columns for each row."""
        return self.block_m * 128


# Tiles 256 wide ask least of the L2 cache. With few tiles, two programs of 128 x 128 per multiprocessor hide each other's last steps,
# but random bits want more registers than two programs leave.
CONFIGS = {
    "large": Config(128, 256, 128, 8, True, True, 8, 4),
    "medium": Config(128, 128, 128, 4, True, True, 4, 3, 2),
    "precise": Config(256, 128, 128, 4, True, False, 8, 4),
    "small": Config(64, 128, 128, 8, False, False, 4, 4, 2),
    "decode": Config(64, 16, 256, 1, False, False, 4, 4, 2),
    "decode_64": Config(64, 64, 128, 1, False, False, 4, 5),
    "blocked": Config(128, 128, 128, 8, False, False, 8, 4),
    "specialized": Config(128, 256, 128, 8, False, False, 4, 4, specialized=True),
    "specialized_blocked": Config(192, 128, 128, 8, False, False, 4, 4, specialized=True),
}


def choose(m: int, n: int, batches: int, sums: str, programs: int, stochastic: bool = False) -> tuple[str, ...]:
    """The names of configurations for an [m, n] output, the fastest first, after the exchange of operands that few rows ask for.

    sums: `fast`, `precise` or `blocked`. The last of them runs everywhere; others may not: see `scaled_mm_launch`.
    """
    few = batches * cdiv(m, 128) * cdiv(n, 128) < programs
    if sums == "blocked":
        return ("specialized_blocked", "blocked") if not few else ("blocked",)
    if n <= 64 and m > n:
        return ("decode",) if n <= 16 else ("decode_64",)
    if few:
        return ("small",)
    if sums == "precise":
        return "specialized", "precise"
    return ("medium",) if batches * cdiv(m, 128) * cdiv(n, 256) < 4 * programs and not stochastic else ("large",)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" and not INTERPRET.value:
        raise KernelError(f"scaled_mm: {NO_GPU}")
    return 4 if INTERPRET.value else torch.cuda.get_device_properties(device).multi_processor_count
