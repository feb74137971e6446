# mypy: allow-untyped-defs, allow-incomplete-defs
"""The update of delayed scaling, one launch per training step over every (site, role) slot at once.

    history [n, H]  newest first      scale [n]      amax [n], of the step just measured      fmax [n], max of the slot's format
    scale_i   = delayed_scale(history_i, scale_i)          order scale_first; history_first reads the rolled history
    history_i = [amax_i, history_i[:-1]]
    amax_i    = reset_to                                   where it is given: ready for the next step

A negative amax was not measured: its slot keeps history and scale.

Reference: `fp8fx.numerics.delayed_update`, equal bit for bit. One program holds the history of one slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import ceil_power_of_two
from fp8fx.kernels.scale import divide, inverse

_INF_BITS = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(2.0**-126)
_LARGEST = tl.constexpr(2.0**126)


@triton.jit
def _delayed_update_kernel(
    history_ptr,
    scale_ptr,
    amax_ptr,
    fmax_ptr,
    powers_ptr,
    length,
    margin,
    reset_to,
    MOST_RECENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,  # 0 no scale is one, 1 all are, 2 powers_ptr says of each slot
    HISTORY_FIRST: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    history = history_ptr + slot * length
    old = tl.load(history + at, mask=at < length, other=0.0)
    new = tl.load(amax_ptr + slot)
    measured = new.to(tl.int32, bitcast=True) >= 0  # its sign bit; a NaN was measured
    # Every value of the row is read before any is written: the row moves in place.
    tl.debug_barrier()
    tl.store(history + 1 + at, old, mask=measured & (at < length - 1))
    tl.store(history, new, mask=measured)
    if RESET:
        tl.store(amax_ptr + slot, reset_to)

    if MOST_RECENT:
        first = tl.max(tl.where(at == 0, old.to(tl.int32, bitcast=True), 0), 0)
        largest = new.to(tl.int32, bitcast=True) if HISTORY_FIRST else first
    else:
        # As int32, so that a NaN counts as more than inf, as in torch's amax; the values are magnitudes.
        bits = old.to(tl.int32, bitcast=True)
        if HISTORY_FIRST:
            bits = tl.where(at < length - 1, bits, 0)
        largest = tl.max(bits, 0)
        if HISTORY_FIRST:
            largest = tl.maximum(largest, new.to(tl.int32, bitcast=True))
    usable = (largest > 0) & (largest < _INF_BITS)
    quotient = divide(tl.load(fmax_ptr + slot), tl.where(usable, largest, 0x3F800000).to(tl.float32, bitcast=True))
    exponent = (quotient.to(tl.int32, bitcast=True) >> 23) - margin
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if POWER_OF_TWO != 1:
        factor = ((127 - margin) << 23).to(tl.float32, bitcast=True)  # 2^-margin
        exact = inverse(tl.minimum(tl.maximum(quotient * factor, _SMALLEST), _LARGEST))
        scale = tl.where(tl.load(powers_ptr + slot), scale, exact) if POWER_OF_TWO == 2 else exact
    tl.store(scale_ptr + slot, scale, mask=usable & measured)


def delayed_update(
    history: Tensor,
    scale: Tensor,
    amax: Tensor,
    fmax: Tensor,
    algorithm: str = "max",
    margin: int = 0,
    power_of_two: bool | Tensor = True,
    order: str = "scale_first",
    reset_to: float | None = None,
) -> None:
    """Update `history` [n, H] and `scale` [n] in place from `amax` [n]; `fmax` [n] holds the largest finite value of each slot's format.

    All float32 and contiguous. power_of_two: of all slots, or bool [n]. reset_to: also set `amax` to that. Raises KernelError for an
    unknown algorithm or order, and for a margin outside [-126, 126].
    """
    if algorithm not in ("max", "most_recent") or order not in ("scale_first", "history_first") or not -126 <= margin <= 126:
        raise KernelError(f"delayed_update: no such rule: algorithm {algorithm!r}, order {order!r}, margin {margin}")
    n, length = history.shape
    tensors = (history, scale, amax, fmax)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors) or any(t.shape != (n,) for t in tensors[1:]):
        raise KernelError(f"delayed_update: expected contiguous float32 [n, H] and three [n], got {[(t.dtype, *t.shape) for t in tensors]}")
    each = isinstance(power_of_two, Tensor)
    if isinstance(power_of_two, Tensor) and (power_of_two.dtype != torch.bool or power_of_two.shape != (n,)):
        raise KernelError(f"delayed_update: power_of_two is a bool or bool [{n}], got {power_of_two.dtype} {tuple(power_of_two.shape)}")
    if n == 0:
        return
    block = ceil_power_of_two(length)
    options = {
        "MOST_RECENT": algorithm == "most_recent",
        "POWER_OF_TWO": 2 if each else int(power_of_two),
        "HISTORY_FIRST": order == "history_first",
        "RESET": reset_to is not None,
        "BLOCK": block,
    }
    args = (*tensors, power_of_two if each else fmax, length, margin, -1.0 if reset_to is None else float(reset_to))
    launch(_delayed_update_kernel, (n,), args, options, num_warps=max(1, min(8, block // 256)))
