# mypy: allow-untyped-defs, allow-incomplete-defs
"""scaled_mm: the FP8 matrix product, every pairing of e4m3fn and e5m2, at any size.

    y [..., M, N] = act((A [..., M, K] @ B [..., K, N]) * scale_a * scale_b + bias)     in float32
    C             = y, one rounding to bf16, fp16 or fp32;  or FP8 codes of y / out_scale;  or the values of such codes

Layout: both operands K-major, A with stride 1 along K and B likewise (a transposed row-major [N, K], as torch._scaled_mm wants
it), rows a multiple of 16 bytes apart. What is laid out otherwise, or has an odd K, is copied once into rows padded to 16 bytes.
Scales are dequantization multipliers in float32: one, one per row of A ([..., M, 1]) or column of B ([..., 1, N]), or one per
block, which multiplies the partial sum of its block of K. `fast` keeps Hopper's own accumulator over the whole of K, `precise`
adds it to float32 registers every 128 (every 256 where rows are few); block scales always do. Few rows (decoding) run transposed,
so that the rows of B fill the 64 of the matrix instruction. What ends a tile, activation, FP8 output and its amax, is in
`scaled_mm_epilogue`. Reference: `fp8fx.ops.scaled_mm` and `quantize`; the order of accumulation differs.

The kernel never synchronizes with the host, and needs no workspace: its descriptors travel as arguments, so it may be captured
into a CUDA graph and run on any stream.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.activations import ACTIVATIONS
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.interpret import INTERPRET
from fp8fx.kernels.launch import launch
from fp8fx.kernels.layout import cdiv
from fp8fx.kernels.rounding import NEAREST, Rounding
from fp8fx.kernels.scaled_mm_kernels import blocked_mm_kernel, scaled_mm_kernel

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


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

    def stages(self, block_k: int, output_bytes: int, parts: int, stochastic: bool = False) -> int:
        """As many as fit into shared memory beside the tile of the output: one in float32 is twice as large. Random bits, 4 bytes each,
        are exchanged between threads in two turns."""
        tile, step = self.block_m * self.block_n // parts * (output_bytes + 2 * stochastic), (self.block_m + self.block_n) * block_k
        return max(2, min(self.num_stages, (SHARED_MEMORY // self.per_multiprocessor - tile) // step))

    def parts(self, stochastic: bool) -> int:
        """In how many parts a tile is finished. Random bits want registers: then a thread finishes 32 elements at a time."""
        each = self.block_m * self.block_n // (32 * self.num_warps)
        return min(max(each // 32, 1), 4) if stochastic else 2 if self.halves else 1


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
}


def choose(m: int, n: int, batches: int, precise: bool, programs: int, stochastic: bool = False) -> str:
    """The name of the configuration for an [m, n] output, after the exchange of operands that few rows ask for."""
    if n <= 64 and m > n:
        return "decode" if n <= 16 else "decode_64"
    if batches * cdiv(m, 128) * cdiv(n, 128) < programs:
        return "small"
    if precise:
        return "precise"
    return "medium" if batches * cdiv(m, 128) * cdiv(n, 256) < 4 * programs and not stochastic else "large"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRET.value else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _End:
    """What ends a tile: bias, activation, and the FP8 rounding of the output to `format`, in codes or in values; see `scaled_mm`."""

    bias: Tensor | None
    activation: str | None
    format: Format | None
    codes: bool
    scale: Tensor | None
    how: Rounding
    record: Tensor | None

    def constexpr(self, turned: bool, columns: int) -> tuple[object, ...]:
        """END, as `scaled_mm_epilogue` reads it; `columns` of C as the kernel sees it."""
        return (
            0 if self.bias is None else 2 if turned else 1,
            -1 if self.activation is None else ACTIVATIONS[self.activation],
            0 if self.format is None else 1 if self.codes else 2,
            self.format is not None and self.format.name == "e5m2",
            self.format is not None and self.how.stochastic,
            self.how.nonfinite,
            self.scale is not None,
            self.record is not None,
            turned,
            columns % 4 == 0,
        )

    def arguments(self, anything: Tensor) -> tuple[Tensor | int, ...]:
        pointers = (self.bias, self.scale, self.record, self.how.rng)
        return (*(anything if part is None else part for part in pointers), self.how.signed_key)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    accumulate: str = "fast",
    block_a: tuple[int, int] | None = None,
    block_b: tuple[int, int] | None = None,
    config: Config | None = None,
    activation: str | None = None,
    out_format: str | Format | None = None,
    round_to: str | Format | None = None,
    out_scale: Tensor | None = None,
    how: Rounding = NEAREST,
    record: Tensor | None = None,
) -> Tensor:
    """C [..., M, N] in `dtype` (bf16, fp16, fp32) of FP8 `a` [..., M, K] and `b` [..., K, N], batches broadcasting; contiguous.

    scale_a: float32 with one element, [..., M, 1], or with block_a = (rows, columns) [..., ceil(M / rows), ceil(K / columns)].
    scale_b: one element, [..., 1, N], or with block_b = (rows, columns) [..., ceil(K / rows), ceil(N / columns)]. Any strides.
    bias: bf16, fp16 or fp32 [N]. accumulate: `fast` or `precise`. activation: silu, gelu, gelu_tanh or relu, of the float32 sums.
    out_format: C holds codes of y in e4m3fn or e5m2, instead of `dtype`; round_to: C holds the values of such codes, in `dtype`.
    out_scale: their dequantization multiplier, float32 with one element, or None; `how` they are rounded. record: float32 with at
    least one element, whose first is raised to amax(y), y the float32 output before it is rounded.
    Raises KernelError for what only the reference does: other formats, blocks along K that are no multiple of 32.
    """
    end = _End(bias, activation, *_rounds(out_format, round_to, out_scale, record), out_scale, how, record)
    _check(a, b, end, dtype, accumulate)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]) if a.dim() + b.dim() > 4 else a.shape[:0]
    (m, k), n, count = a.shape[-2:], b.shape[-1], math.prod(batch)
    c = torch.empty((*batch, m, n), dtype=end.format.torch_dtype if end.codes and end.format else dtype, device=a.device)
    if c.numel() == 0:
        return c
    if k == 0:  # an empty sum: one term, of zeros
        a, b = (x.new_empty(shape, dtype=torch.uint8).zero_().view(x.dtype) for x, shape in ((a, (m, 16)), (b, (16, n))))
        scale_a = scale_b = torch.ones((), dtype=torch.float32, device=a.device)
        block_a = block_b = None
    left, right = (
        _Operand.of(a, batch, scale_a, block_a),
        _Operand.of(b.mT, batch, scale_b.mT if scale_b.dim() > 1 else scale_b, _turn(block_b)),
    )
    c3 = c.view(count, m, n)
    if m <= 64 and n > m:  # few rows: C^T = B^T A^T
        _launch(right, left, c3.mT, end, True, accumulate == "precise", config)
    else:
        _launch(left, right, c3, end, False, accumulate == "precise", config)
    return c


def _rounds(
    out_format: str | Format | None, round_to: str | Format | None, scale: Tensor | None, record: Tensor | None
) -> tuple[Format | None, bool]:
    """The format of the output's FP8 rounding, and whether codes are what is stored."""
    if out_format is not None and round_to is not None:
        raise KernelError("scaled_mm: out_format stores codes, round_to their values: pass one of them")
    format = out_format if out_format is not None else round_to
    for name, part, needed in (("out_scale", scale, 1), ("record", record, 0)):
        if part is not None and (part.dtype != torch.float32 or not part.numel() or (needed and part.numel() != needed)):
            raise KernelError(f"scaled_mm: {name} must be float32 with one element, got {part.dtype} of shape {tuple(part.shape)}")
    if scale is not None and format is None:
        raise KernelError("scaled_mm: out_scale scales an FP8 output: pass out_format or round_to")
    return None if format is None else hardware_format(format), out_format is not None


def _check(a: Tensor, b: Tensor, end: _End, dtype: torch.dtype, accumulate: str) -> None:
    bias = end.bias
    if a.dtype not in _FP8 or b.dtype not in _FP8:
        raise KernelError(f"scaled_mm: operands must be float8_e4m3fn or float8_e5m2, got {a.dtype} and {b.dtype}")
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise KernelError(f"scaled_mm: expected [..., M, K] and [..., K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    if dtype not in _DTYPES or accumulate not in ("fast", "precise"):
        raise KernelError(f"scaled_mm: no output of {dtype} with accumulation {accumulate!r}")
    if bias is not None and (bias.shape != b.shape[-1:] or bias.dtype not in _DTYPES):
        raise KernelError(f"scaled_mm: bias must be bf16, fp16 or fp32 [{b.shape[-1]}], got {bias.dtype} {tuple(bias.shape)}")
    if end.activation is not None and end.activation not in ACTIVATIONS:
        raise KernelError(f"scaled_mm: no kernel for activation {end.activation!r}; there is one for {', '.join(ACTIVATIONS)}")


def _turn(block: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if block is None else (block[1], block[0])


@dataclass(frozen=True)
class _Operand:
    """One operand as the kernel reads it: codes [rows of all batches, K] with K innermost, and its scales over [batch, rows, K]."""

    codes: Tensor
    rows: int  # of one batch
    batch_rows: int  # from one batch to the next; 0 where one matrix serves all
    scale: Tensor
    block: tuple[int, int] | None

    @classmethod
    def of(cls, x: Tensor, batch: torch.Size, scale: Tensor, block: tuple[int, int] | None) -> _Operand:
        """`x` [..., R, K] with `scale` in the same orientation."""
        if x.dim() == 2 and scale.numel() == 1 and scale.dtype == torch.float32 and _readable(x):
            return cls(x, x.shape[0], 0, scale, block)
        shared = math.prod(x.shape[:-2]) == 1
        if not shared:
            x = x.expand(*batch, *x.shape[-2:])
        flat = x.reshape(-1, *x.shape[-2:])
        rows, k = flat.shape[1:]
        if scale.dtype != torch.float32:
            raise KernelError(f"scaled_mm: scales must be float32, got {scale.dtype}")
        if scale.numel() != 1:
            wanted = (rows, 1) if block is None else (cdiv(rows, block[0]), cdiv(k, block[1]))
            if tuple(scale.shape[-2:]) != wanted:
                raise KernelError(
                    f"scaled_mm: scale of shape {tuple(scale.shape)} for {rows} rows of {k}, block {block}: expected {wanted}"
                )
            scale = scale.expand(*batch, *wanted).reshape(-1, *wanted)
            if block is None:  # found by its number, not by strides
                scale = scale.contiguous()
        return cls(_stacked(flat), rows, 0 if shared else rows, scale, block)

    @property
    def per_row(self) -> bool:
        return self.block is None and self.scale.numel() != 1

    def strides(self) -> tuple[int, int, int]:
        """Of the scales, by batch, row (or block of rows) and block of K; 0 where one scale serves all."""
        if self.scale.numel() == 1:
            return 0, 0, 0
        by_batch, by_row, by_k = self.scale.stride()
        return (by_batch if self.batch_rows else 0), by_row, (0 if self.block is None else by_k)

    def descriptor(self, block_rows: int, block_k: int) -> TensorDescriptor:
        return TensorDescriptor(self.codes, list(self.codes.shape), list(self.codes.stride()), [block_rows, block_k])


def _readable(x: Tensor) -> bool:
    """Whether the copy engine can read [R, K] as it lies."""
    by_row, by_k = x.stride()
    return by_k == 1 and by_row % 16 == 0 and by_row >= x.shape[1] and x.data_ptr() % 16 == 0


def _stacked(x: Tensor) -> Tensor:
    """[B, R, K] as [B * R, K] that the copy engine can read: stride 1 along K, rows and start on multiples of 16 bytes."""
    count, rows, k = x.shape
    by_batch, by_row, by_k = x.stride()
    aligned = (by_k == 1 or k == 1) and (by_row % 16 == 0 or rows == 1) and by_row >= k and x.data_ptr() % 16 == 0
    if aligned and (count == 1 or by_batch == rows * by_row):
        pitch = by_row if rows > 1 or count > 1 else cdiv(k, 16) * 16
        if pitch % 16 == 0:
            return x.as_strided((count * rows, k), (pitch, 1))
    padded = torch.empty((count * rows, cdiv(k, 16) * 16), dtype=x.dtype, device=x.device)
    padded.view(torch.uint8)[:, :k].view(count, rows, k).copy_(x.view(torch.uint8))
    return padded[:, :k]


def _launch(a: _Operand, b: _Operand, c: Tensor, end: _End, turned: bool, precise: bool, config: Config | None) -> None:
    """c [B, M, N], any strides, from A and B^T. turned: c is the C^T of the caller."""
    count, m, n = c.shape
    k = a.codes.shape[1]
    blocked = a.block is not None or b.block is not None
    stochastic = end.format is not None and end.how.stochastic
    if blocked:  # refused before anything asks for a device
        chosen = config or CONFIGS["blocked"]
        block_k = _block_k(a, b, chosen.block_k)
    programs = multiprocessors(c.device)
    if not blocked:
        chosen = config or CONFIGS[choose(m, n, count, precise, programs, stochastic)]
        block_k = chosen.block_k
    parts = chosen.parts(stochastic)
    by_tma = c.stride(2) == 1 and c.stride(1) * c.element_size() % 16 == 0 and (count == 1 or m % chosen.block_m == 0)
    target = TensorDescriptor(c, [count * m, n], [c.stride(1), 1], [chosen.block_m, chosen.block_n // parts]) if by_tma else c
    tiles = count * cdiv(m, chosen.block_m) * cdiv(n, chosen.block_n)
    operands = (a.descriptor(chosen.block_m, block_k), b.descriptor(chosen.block_n, block_k), target, a.scale, b.scale)
    sizes = (*end.arguments(a.scale), count, m, n, k, a.batch_rows, b.batch_rows, *c.stride())
    programs *= chosen.per_multiprocessor
    grid = (min(tiles, programs),)
    constexprs: dict[str, object] = {
        "END": end.constexpr(turned, n),
        "TMA_STORE": by_tma,
        "PARTS": parts,
        "DTYPE": (_DTYPES | _FP8)[c.dtype],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": block_k,
        "GROUP": chosen.group,
        "PROGRAMS": programs,
    }
    if blocked:
        rows = [operand.block[0] if operand.block else 1 for operand in (a, b)]
        steps = [max(operand.block[1] // block_k, 1) if operand.block else 1 for operand in (a, b)]
        constexprs |= {"BLOCK_ROWS_A": rows[0], "BLOCK_ROWS_B": rows[1], "STEPS_A": steps[0], "STEPS_B": steps[1]}
        sizes = (*sizes, *a.strides(), *b.strides())
    else:
        constexprs |= {"ROW_A": a.per_row, "ROW_B": b.per_row, "PRECISE": precise, "FLATTEN": chosen.flatten}
    kernel = blocked_mm_kernel if blocked else scaled_mm_kernel
    stages = chosen.stages(block_k, c.element_size(), parts, stochastic)
    launch(kernel, grid, (*operands, *sizes), constexprs, num_warps=chosen.num_warps, num_stages=stages)


def _block_k(a: _Operand, b: _Operand, most: int) -> int:
    """The step along K: it divides the blocks of both operands."""
    step = math.gcd(*(operand.block[1] for operand in (a, b) if operand.block is not None), most)
    if step < 32:
        raise KernelError(f"scaled_mm: blocks {a.block} and {b.block} are no multiples of 32 along K: run the reference operator instead")
    return step
