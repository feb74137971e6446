"""scaled_mm: the FP8 matrix product, every pairing of e4m3fn and e5m2, at any size.

    y [..., M, N] = act((A [..., M, K] @ B [..., K, N]) * scale_a * scale_b + bias)     in float32
    C             = y, one rounding to bf16, fp16 or fp32;  or FP8 codes of y / out_scale;  or the values of such codes

Layout: both operands K-major, A with stride 1 along K and B likewise (a transposed row-major [N, K], as torch._scaled_mm wants
it), rows a multiple of 16 bytes apart. What is laid out otherwise, or has an odd K, is copied once into rows padded to 16 bytes.
Scales are dequantization multipliers in float32: one, one per row of A ([..., M, 1]) or column of B ([..., 1, N]), or one per
block, which multiplies the partial sum of its block of K. `fast` keeps Hopper's own accumulator over the whole of K, `precise`
adds it to float32 registers every 128 (every 256 where rows are few); block scales always do. Few rows (decoding) run transposed,
so that the rows of B fill the 64 of the matrix instruction. What ends a tile, activation, FP8 output and its amax, is in
`scaled_mm_epilogue`; which kernel runs, with which tiles, in `scaled_mm_launch`. Reference: `fp8fx.ops.scaled_mm` and `quantize`; the
order of accumulation differs.

The kernels never synchronize with the host, and need no workspace: their descriptors travel as arguments, so they may be captured
into a CUDA graph and run on any stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8fx.errors import KernelError
from fp8fx.formats import Format
from fp8fx.kernels.activations import ACTIVATIONS
from fp8fx.kernels.codes import hardware_format
from fp8fx.kernels.rounding import NEAREST, Rounding
from fp8fx.kernels.scaled_mm_configs import Config
from fp8fx.kernels.scaled_mm_epilogue import End
from fp8fx.kernels.scaled_mm_launch import DTYPES, FP8, launch_mm
from fp8fx.kernels.scaled_mm_operands import Operand


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
    end = End(bias, activation, *_rounds(out_format, round_to, out_scale, record), out_scale, how, record)
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
        Operand.of(a, batch, scale_a, block_a),
        Operand.of(b.mT, batch, scale_b.mT if scale_b.dim() > 1 else scale_b, _turn(block_b)),
    )
    c3 = c.view(count, m, n)
    if m <= 64 and n > m:  # few rows: C^T = B^T A^T
        launch_mm(right, left, c3.mT, end, True, accumulate == "precise", config)
    else:
        launch_mm(left, right, c3, end, False, accumulate == "precise", config)
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


def _check(a: Tensor, b: Tensor, end: End, dtype: torch.dtype, accumulate: str) -> None:
    bias = end.bias
    if a.dtype not in FP8 or b.dtype not in FP8:
        raise KernelError(f"scaled_mm: operands must be float8_e4m3fn or float8_e5m2, got {a.dtype} and {b.dtype}")
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise KernelError(f"scaled_mm: expected [..., M, K] and [..., K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    if dtype not in DTYPES or accumulate not in ("fast", "precise"):
        raise KernelError(f"scaled_mm: no output of {dtype} with accumulation {accumulate!r}")
    if bias is not None and (bias.shape != b.shape[-1:] or bias.dtype not in DTYPES):
        raise KernelError(f"scaled_mm: bias must be bf16, fp16 or fp32 [{b.shape[-1]}], got {bias.dtype} {tuple(bias.shape)}")
    if end.activation is not None and end.activation not in ACTIVATIONS:
        raise KernelError(f"scaled_mm: no kernel for activation {end.activation!r}; there is one for {', '.join(ACTIVATIONS)}")


def _turn(block: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if block is None else (block[1], block[0])
