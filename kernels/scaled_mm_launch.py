"""Which kernel of scaled_mm runs, with which tiles: from operands, an output and an ending to a launch.

The fastest configuration first (`scaled_mm_configs.choose`). One that is specialized wants an output that the copy engine can store, and
Gluon, which is an experimental part of Triton: where it does not compile, the next one runs.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8fx.errors import KernelError
from fp8fx.kernels.gluon import LOG, OTHER_VERSION, SPECIALIZED
from fp8fx.kernels.launch import KernelCompileError, launch
from fp8fx.kernels.layout import cdiv
from fp8fx.kernels.scaled_mm_configs import CONFIGS, Config, choose, multiprocessors
from fp8fx.kernels.scaled_mm_epilogue import End
from fp8fx.kernels.scaled_mm_kernels import blocked_mm_kernel, scaled_mm_kernel
from fp8fx.kernels.scaled_mm_operands import Operand

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


class _Product(NamedTuple):
    """c [B, M, N], any strides, from A and B^T. turned: c is the C^T of the caller. sums: `fast`, `precise` or `blocked`."""

    a: Operand
    b: Operand
    c: Tensor
    end: End
    turned: bool
    sums: str

    @property
    def stochastic(self) -> bool:
        return self.end.format is not None and self.end.how.stochastic

    def stored_by_tma(self, block_m: int) -> bool:
        """Whether the copy engine can store c as it lies, no tile reaching into the next batch."""
        count, m, _ = self.c.shape
        return self.c.stride(2) == 1 and self.c.stride(1) * self.c.element_size() % 16 == 0 and (count == 1 or m % block_m == 0)

    def block_k(self, most: int) -> int:
        """The step along K: it divides the blocks of both operands."""
        blocks = [operand.block[1] for operand in (self.a, self.b) if operand.block is not None]
        step = math.gcd(*blocks, most)
        if step < 32:
            raise KernelError(
                f"scaled_mm: blocks {self.a.block} and {self.b.block} are no multiples of 32 along K: run the reference operator instead"
            )
        return step

    def scales_of_b(self, block_n: int) -> str:
        """Of the blocks' scales, the columns of a tile have `one`, or `each` its own and as the copy engine can read them; or `other`."""
        b, count = self.b, self.c.shape[0]
        by_batch, by_column, by_k = b.strides()
        if b.scale.numel() == 1 or (b.block is not None and b.block[0] % block_n == 0):
            return "one"
        single = b.block is not None and b.block[0] == 1 and (count == 1 or (by_batch == 0 and b.batch_rows == 0))
        readable = by_column == 1 and by_k > 0 and by_k * 4 % 16 == 0 and b.scale.data_ptr() % 16 == 0
        return "each" if single and readable else "other"

    def blocks(self, block_k: int) -> tuple[int, int, int, int]:
        """Rows of A and of B that share a scale, and steps along K that do."""
        rows = [operand.block[0] if operand.block else 1 for operand in (self.a, self.b)]
        steps = [max(operand.block[1] // block_k, 1) if operand.block else 1 for operand in (self.a, self.b)]
        return rows[0], rows[1], steps[0], steps[1]


def launch_mm(a: Operand, b: Operand, c: Tensor, end: End, turned: bool, precise: bool, config: Config | None) -> None:
    """c [B, M, N], any strides, from A and B^T. turned: c is the C^T of the caller; config: instead of the one that its size asks for."""
    blocked = a.block is not None or b.block is not None
    product = _Product(a, b, c, end, turned, "blocked" if blocked else "precise" if precise else "fast")
    if blocked:  # refused before anything asks for a device
        product.block_k(128)
    programs = multiprocessors(c.device)
    count, m, n = c.shape
    configs = [config] if config else [CONFIGS[name] for name in choose(m, n, count, product.sums, programs, product.stochastic)]
    for chosen in configs:
        if chosen.specialized and not _can_be_specialized(product, chosen):
            continue
        try:
            return (_launch_specialized if chosen.specialized else _launch)(product, chosen, programs)
        except KernelCompileError as error:
            if chosen is configs[-1]:
                raise
            _replaced(str(error))
    raise KernelError(
        "scaled_mm: a specialized configuration wants Gluon and a Hopper GPU, precise sums or blocks, rows of C a multiple of 16 bytes "
        f"apart, of several batches a multiple of {chosen.block_m} rows each, and blocks of B as wide as a tile, or of one column with "
        "scales in rows a multiple of 16 bytes apart"
    )


@functools.cache
def _replaced(reason: str) -> None:
    """Once for each reason: nothing is lost but speed."""
    LOG.warning("fp8fx: a plain kernel replaces the specialized one, slower. %s", reason)


def _can_be_specialized(product: _Product, chosen: Config) -> bool:
    if SPECIALIZED is None or not _is_hopper(product.c.device) or not product.stored_by_tma(chosen.block_m):
        return False
    return product.sums == "precise" or (product.sums == "blocked" and product.scales_of_b(chosen.block_n) != "other")


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Or no GPU at all: a test that compiles for one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _arguments(product: _Product, describe: Any, target: Any, rows_a: int, rows_b: int, block_k: int) -> tuple[Any, ...]:
    """What both kernels take first: descriptors of blocks of so many rows, scales, the ending, sizes."""
    a, b, (count, m, n) = product.a, product.b, product.c.shape
    operands = (describe(a.codes, rows_a, block_k), describe(b.codes, rows_b, block_k), target, a.scale, b.scale)
    return (*operands, *product.end.arguments(a.scale), count, m, n, a.codes.shape[1], a.batch_rows, b.batch_rows)


def _tiles(product: _Product, chosen: Config) -> int:
    count, m, n = product.c.shape
    return int(count) * cdiv(m, chosen.block_m) * cdiv(n, chosen.block_n)


def _described(codes: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(codes, list(codes.shape), list(codes.stride()), [rows, columns])


def _launch(product: _Product, chosen: Config, programs: int) -> None:
    a, b, c, end, turned, sums = product
    count, m, n = c.shape
    block_k, parts = product.block_k(chosen.block_k), chosen.parts(product.stochastic)
    by_tma = product.stored_by_tma(chosen.block_m)
    target = TensorDescriptor(c, [count * m, n], [c.stride(1), 1], [chosen.block_m, chosen.block_n // parts]) if by_tma else c
    arguments = (*_arguments(product, _described, target, chosen.block_m, chosen.block_n, block_k), *c.stride())
    programs *= chosen.per_multiprocessor
    constexprs: dict[str, object] = {
        "END": end.constexpr(turned, n),
        "TMA_STORE": by_tma,
        "PARTS": parts,
        "DTYPE": (DTYPES | FP8)[c.dtype],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": block_k,
        "GROUP": chosen.group,
        "PROGRAMS": programs,
    }
    if sums == "blocked":
        names = ("BLOCK_ROWS_A", "BLOCK_ROWS_B", "STEPS_A", "STEPS_B")
        constexprs |= dict(zip(names, product.blocks(block_k), strict=True))
        arguments = (*arguments, *a.strides(), *b.strides())
    else:
        constexprs |= {"ROW_A": a.per_row, "ROW_B": b.per_row, "PRECISE": sums == "precise", "FLATTEN": chosen.flatten}
    kernel = blocked_mm_kernel if sums == "blocked" else scaled_mm_kernel
    stages = chosen.stages(block_k, c.element_size(), chosen.block_m * chosen.block_n // parts, product.stochastic)
    grid = (min(_tiles(product, chosen), programs),)
    launch(kernel, grid, arguments, constexprs, num_warps=chosen.num_warps, num_stages=stages)


def _launch_specialized(product: _Product, chosen: Config, programs: int) -> None:
    a, b, c, end, turned, sums = product
    count, m, n = c.shape
    block_k = product.block_k(chosen.block_k)
    each = sums == "blocked" and product.scales_of_b(chosen.block_n) == "each"
    try:
        rows, described = SPECIALIZED.ROWS.value, SPECIALIZED.described
        target = described(c, [count * m, n], [c.stride(1), 1], [rows, SPECIALIZED.WIDTH])
        columns: Any = b.scale  # nobody reads it, where it is no descriptor
        if each:
            columns = described(b.scale, [b.scale.shape[-1], n], [b.strides()[2], 1], [1, chosen.block_n])

        def describe(codes: Tensor, *block: int) -> Any:
            return described(codes, list(codes.shape), list(codes.stride()), list(block))

        first = _arguments(product, describe, target, rows, chosen.block_n, block_k)
    except OTHER_VERSION as error:
        raise KernelCompileError(f"scaled_mm: this Triton's Gluon is not the one that is known to work: {error}") from error
    constexprs = {
        "END": end.constexpr(turned, n),
        "BLOCKED": sums == "blocked",
        "PER_ROW": (a.per_row, b.per_row),
        "BLOCKS": product.blocks(block_k),
        "BESIDE": each,
        "GROUP": chosen.group,
        "PROGRAMS": programs,
        "STAGES": chosen.stages(block_k, c.element_size(), chosen.room),
        "WARPGROUPS": chosen.block_m // rows,
    }
    grid = (min(_tiles(product, chosen), programs),)
    launch(SPECIALIZED.specialized_mm_kernel, grid, (*first, columns, *a.strides(), *b.strides()), constexprs, num_warps=chosen.num_warps)
