# mypy: allow-untyped-defs, allow-incomplete-defs
"""cast: a high-precision tensor to FP8 codes, their transpose and amax, in one read of it.

    q   [..., M, K] = encode(float32(x) * inv_scale)        row-major
    qT  [..., K, M] = the same codes transposed             row-major: the layout in which the other GEMM contracts
    amax            = max(amax, max |x| over finite x)

Hopper's FP8 matrix instructions take both operands with the contraction innermost, and forward and backward contract over
different axes, so each operand is wanted in both layouts. With one scale per tensor both hold the same codes; scales along the
contraction (`row` for q, `column` for qT) give each its own. Scales are read, or made from an amax that was just measured, in
this kernel. The random bits of stochastic rounding belong to the element of x, so q and qT share each decision.

Reference: `fp8fx.numerics.quantize_scaled`, equal byte for byte. A tile is read once, in four quarters (see
`quarters`), encoded in registers and stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.amax import amax_each, amax_of, merge_amax
from fp8fx.kernels.codes import encode, hardware_format, random_tile
from fp8fx.kernels.layout import AXES, axis_shape, axis_size, batches, check_input, transposed_shape, widest
from fp8fx.kernels.quarters import byte_views, load_quarter, locate, store_quarter, store_transposed, zero_codes
from fp8fx.kernels.scale import compute_scale, current_scale, inverse

# what is written -> BLOCK_M, BLOCK_K, num_warps; `flat`: any contiguous tensor with one scale, as long rows
_CONFIGS = {"rows": (64, 128, 4), "transposed": (64, 128, 4), "flat": (4, 4096, 8)}

LAYOUTS = ("rows", "transposed", "both")


class Quantized(NamedTuple):
    """Codes, scales and amax in both layouts; None where not asked for. `*_t` belong to qT and have the shapes of x's own axes."""

    q: Tensor | None
    q_t: Tensor | None
    scale: Tensor | None
    scale_t: Tensor | None
    amax: Tensor | None
    amax_t: Tensor | None


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
    def signed_key(self) -> int:
        """The key as int32, so that every key runs the same compiled kernel."""
        return (self.key & 0xFFFFFFFF) - ((self.key & 0x80000000) << 1)


NEAREST = Rounding()


@triton.jit
def _read_inverse(source, index, inside, first, E5M2: tl.constexpr, FROM_AMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """inv_scale at `index` of source = (scale or amax, made scale, eps). FROM_AMAX: the scale is made from amax, and the programs that
    come `first` along its axis store it."""
    ptr, made_ptr, eps = source
    scale = tl.load(ptr + index, mask=inside, other=1.0)
    if FROM_AMAX:
        scale = current_scale(scale, eps, 57344.0 if E5M2 else 448.0, POWER_OF_TWO)
        tl.store(made_ptr + index, scale, mask=inside & first)
    return inverse(scale)


@triton.jit
def _common_inverse(source, place, columns, AXIS: tl.constexpr, E5M2: tl.constexpr, FROM_AMAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """inv_scale as far as all rows of the tile share it: a scalar, [1, BLOCK_K] for scales per column, else 1."""
    b, tile_m, tile_k, _, K = place
    if AXIS == 0:
        return _read_inverse(source, 0, True, (b + tile_m + tile_k) == 0, E5M2, FROM_AMAX, POWER_OF_TWO)
    elif AXIS == 2:
        return _read_inverse(source, b * K + columns, columns < K, tile_m == 0, E5M2, FROM_AMAX, POWER_OF_TWO)[None, :]
    else:
        return 1.0


@triton.jit
def _encode_quarter(
    x,
    common,
    source,
    random,
    place,
    rows,
    AXIS: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NONFINITE: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """uint8 codes of one quarter under the scales of one side."""
    b, _, tile_k, M, K = place
    y = x
    if AXIS == 1:
        y = x * _read_inverse(source, b * M + rows, rows < M, tile_k == 0, E5M2, FROM_AMAX, POWER_OF_TWO)[:, None]
    elif AXIS != 3:
        y = x * common
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        bits = random_tile(random, b * M + rows.to(tl.int64), tile_k * x.shape[1], K, x.shape[0], x.shape[1], GROUPED)
    return encode(y, x, bits, E5M2, STOCHASTIC, NONFINITE)


@triton.jit(do_not_specialize=["key"])
def _cast_kernel(
    x_ptr,
    q_ptr,
    t_ptr,
    scale_ptr,
    made_ptr,
    scale_t_ptr,
    made_t_ptr,
    amax_ptr,
    rng_ptr,
    key,
    eps,
    M,
    K,
    M_WORDS,
    stride_xb,
    stride_xm,
    stride_xk,
    AXIS: tl.constexpr,  # -1 no q, 0 tensor, 1 row, 2 column, 3 unscaled
    AXIS_T: tl.constexpr,  # the same of qT; -2: the codes of q
    FROM_AMAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    E5M2: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NONFINITE: tl.constexpr,
    GROUPED: tl.constexpr,
    AMAX: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    place, rows, words, columns = locate(M, K, BLOCK_M, BLOCK_K)
    seen = tl.load(amax_ptr) if AMAX else 0
    strides = (stride_xb, stride_xm, stride_xk)
    x0 = load_quarter(x_ptr, place, rows, columns, strides)
    x1 = load_quarter(x_ptr, place, rows + 1, columns, strides)
    x2 = load_quarter(x_ptr, place, rows + 2, columns, strides)
    x3 = load_quarter(x_ptr, place, rows + 3, columns, strides)

    random = (rng_ptr, key)
    c0, c1, c2, c3 = zero_codes(x0)
    if AXIS >= 0:
        source = (scale_ptr, made_ptr, eps)
        inv = _common_inverse(source, place, columns, AXIS, E5M2, FROM_AMAX, POWER_OF_TWO)
        c0 = _encode_quarter(x0, inv, source, random, place, rows, AXIS, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
        store_quarter(q_ptr, c0, place, rows, columns)
        c1 = _encode_quarter(x1, inv, source, random, place, rows + 1, AXIS, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
        store_quarter(q_ptr, c1, place, rows + 1, columns)
        c2 = _encode_quarter(x2, inv, source, random, place, rows + 2, AXIS, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
        store_quarter(q_ptr, c2, place, rows + 2, columns)
        c3 = _encode_quarter(x3, inv, source, random, place, rows + 3, AXIS, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
        store_quarter(q_ptr, c3, place, rows + 3, columns)
    if AXIS_T >= 0:
        turned = (scale_t_ptr, made_t_ptr, eps)
        inv_t = _common_inverse(turned, place, columns, AXIS_T, E5M2, FROM_AMAX, POWER_OF_TWO)
        c0 = _encode_quarter(x0, inv_t, turned, random, place, rows, AXIS_T, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED)
        c1 = _encode_quarter(
            x1, inv_t, turned, random, place, rows + 1, AXIS_T, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED
        )
        c2 = _encode_quarter(
            x2, inv_t, turned, random, place, rows + 2, AXIS_T, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED
        )
        c3 = _encode_quarter(
            x3, inv_t, turned, random, place, rows + 3, AXIS_T, FROM_AMAX, POWER_OF_TWO, E5M2, STOCHASTIC, NONFINITE, GROUPED
        )
    if AXIS_T != -1:
        store_transposed(t_ptr, c0, c1, c2, c3, place, rows, words, columns, M_WORDS, PACKED)
    if AMAX:
        merge_amax(amax_ptr, seen, amax_of(x0, x1, x2, x3))


def cast(
    x: Tensor,
    format: str | Format,
    scale: Tensor | None = None,
    granularity: str = "tensor",
    layout: str = "rows",
    how: Rounding = NEAREST,
    amax: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(q [..., M, K], qT [..., K, M]) of bf16, fp16 or fp32 `x`, the one that `layout` (rows, transposed, both) leaves out None.

    scale: the dequantization multiplier, float32 with one element (granularity `tensor`), one per row or one per column; None: x
    itself is rounded. amax: float32 with one element, raised to amax(x) if that is larger.
    """
    check_input(x, "cast")
    axis = 3 if scale is None else AXES[granularity]
    axes = (axis if layout != "transposed" else -1, {"rows": -1, "both": -2, "transposed": axis}[layout])
    if scale is not None:
        expected = axis_size(batches(x), granularity)
        if scale.dtype != torch.float32 or scale.numel() != expected:
            raise KernelError(f"cast: scale must be float32 with {expected} elements, got {scale.dtype} of shape {tuple(scale.shape)}")
        scale = scale.contiguous()
    if amax is not None and (amax.dtype != torch.float32 or amax.numel() != 1):
        raise KernelError(f"cast: amax must be float32 with one element, got {amax.dtype} of shape {tuple(amax.shape)}")
    return _launch(x, hardware_format(format), axes, (scale, scale), (None, None), amax, how)


def cast_current(
    x: Tensor,
    format: str | Format,
    granularity: str = "tensor",
    granularity_t: str | None = None,
    layout: str = "rows",
    how: Rounding = NEAREST,
    power_of_two: bool = False,
    eps: float = 1e-12,
) -> Quantized:
    """Current scaling: amax in one read of x, scales and codes in a second. granularity `tensor`, `row` or `column` for q, likewise qT.

    With layout `both` and granularity_t None, or the same, q and qT share codes and scale. Scales have the shapes of
    `fp8fx.numerics.amax`: [], [..., M, 1] or [..., 1, K], also those of qT.
    """
    check_input(x, "cast_current")
    own_t = granularity if granularity_t is None else granularity_t
    sides = {"rows": (granularity, None), "transposed": (None, own_t), "both": (granularity, own_t)}[layout]
    wanted = tuple(dict.fromkeys(side for side in sides if side is not None))
    found = dict(zip(wanted, amax_each(x, wanted), strict=True))
    made = {g: torch.empty(axis_shape(x.shape, g), dtype=torch.float32, device=x.device) for g in wanted}
    shared = sides[0] == sides[1]
    axes = (-1 if sides[0] is None else AXES[sides[0]], -2 if shared else -1 if sides[1] is None else AXES[sides[1]])
    amaxes, scales = ([None if side is None else table[side] for side in sides] for table in (found, made))
    parts = _launch(x, hardware_format(format), axes, tuple(amaxes), tuple(scales), None, how, power_of_two, eps)
    if x.numel() == 0:
        for scale, largest in zip(scales, amaxes, strict=True):
            if scale is not None and largest is not None:
                scale.copy_(compute_scale(largest, format, power_of_two, eps))
    return Quantized(*parts, *scales, *amaxes)


def _launch(
    x: Tensor,
    format: Format,
    axes: tuple[int, int],
    scales: tuple[Tensor | None, ...],
    made: tuple[Tensor | None, ...],
    amax: Tensor | None,
    how: Rounding,
    power_of_two: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """(q, qT), the one that `axes` leaves out None. Scales are contiguous float32, indexed by the axis."""
    q = torch.empty(x.shape, dtype=format.torch_dtype, device=x.device) if axes[0] >= 0 else None
    t = torch.empty(transposed_shape(x.shape), dtype=format.torch_dtype, device=x.device) if axes[1] != -1 else None
    if x.numel() == 0:
        return q, t
    flat = t is None and axes[0] in (0, 3) and x.is_contiguous()
    grid_x = widest(x) if flat else batches(x)
    block_m, block_k, warps = _CONFIGS["flat" if flat and grid_x.shape[-1] == 4096 else "rows" if t is None else "transposed"]
    count, m, k = grid_x.shape
    # A pointer that the constexprs switch off is never read: any tensor stands in.
    codes, packed = byte_views(x, q, t)
    pointers = [x if part is None else part for pair in zip(scales, made, strict=True) for part in pair]
    _cast_kernel[(count * triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)](
        grid_x,
        *codes,
        *pointers,
        x if amax is None else amax.view(torch.int32),
        x if how.rng is None else how.rng,
        how.signed_key,
        eps,
        m,
        k,
        m // 4,
        *grid_x.stride(),
        AXIS=axes[0],
        AXIS_T=axes[1],
        FROM_AMAX=any(part is not None for part in made),
        POWER_OF_TWO=power_of_two,
        E5M2=format.name == "e5m2",
        STOCHASTIC=how.rounding == "stochastic",
        NONFINITE=how.overflow == "nonfinite",
        GROUPED=k % 4 == 0,
        AMAX=amax is not None,
        PACKED=packed,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return q, t
