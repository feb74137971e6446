# mypy: allow-untyped-defs, allow-incomplete-defs
"""The sums of a warpgroup in `scaled_mm_specialized`: its 64 rows of a tile of C, float32, from operands that arrive in a ring.

    precise_sums    every step's product is added to float32 registers
    blocked_sums    and is scaled before, by the scales of its blocks

ring = (A [stages * warpgroups, 64, BLOCK_K], B [stages, BLOCK_N, BLOCK_K], barriers that say full, barriers that say empty, and scales of
B's columns [stages, 1, BLOCK_N], float32). `turn` counts steps from the beginning of the program: it uses the buffers turn % stages, and
waits for the phase that their barrier has after turn // stages rounds. An `arrive` is one thread's, and speaks for all 128 of its
warpgroup: Triton has them meet before it, so that all have read. Columns in several tensors are one after the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

ROWS = gl.constexpr(64)  # of a warpgroup: those of the matrix instruction


@gluon.jit
def halves(sums):
    """The left and the right half of sums, of which every thread holds both."""
    WIDTH: gl.constexpr = sums.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    left, right = sums.reshape(ROWS, 2, WIDTH).permute(0, 2, 1).split()
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@gluon.jit
def _product(rows, columns):
    """rows [64, BLOCK_K] times columns [WIDTH, BLOCK_K], transposed; complete."""
    WIDTH: gl.constexpr = columns.shape[0]
    nothing = gl.zeros([ROWS, WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32]))
    return warpgroup_mma_wait(0, [warpgroup_mma(rows, columns.permute((1, 0)), nothing, use_acc=False, is_async=True)])


@gluon.jit
def precise_sums(ring, turn, steps, WHO: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Two of [64, BLOCK_N / 2]: registers hold the sums, and a product of half the width."""
    left, right, full, empty, _ = ring
    STAGES: gl.constexpr = right.shape[0]
    WIDTH: gl.constexpr = right.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    acc_0 = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    acc_1 = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
    for _ in range(steps):
        slot = turn % STAGES
        mbarrier.wait(full.index(slot), turn // STAGES & 1)
        rows, columns = left.index(slot * WARPGROUPS + WHO), right.index(slot)
        acc_0 += _product(rows, columns.slice(0, WIDTH))
        part = _product(rows, columns.slice(WIDTH, WIDTH))
        mbarrier.arrive(empty.index(slot))
        acc_1 += part
        turn += 1
    return acc_0, acc_1


@gluon.jit
def blocked_sums(
    ring, turn, steps, place, scales, strides, BLOCKS: gl.constexpr, BESIDE: gl.constexpr, WHO: gl.constexpr, WARPGROUPS: gl.constexpr
):
    """[64, BLOCK_N]. BLOCKS and strides: see `scaled_mm_kernels.blocked_mm_kernel`. BESIDE: every column of the tile has a scale of its
    own, which came with the operands; else all share one."""
    left, right, full, empty, beside = ring
    scale_a_ptr, scale_b_ptr = scales
    batch, row, column, M, _ = place
    by_batch_a, by_row_a, by_k_a, by_batch_b, by_row_b, by_k_b = strides
    STAGES: gl.constexpr = right.shape[0]
    BLOCK_N: gl.constexpr = right.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    # Offsets of 32 bits: fewer than 2^31 scales, each of 32 codes or more.
    at_a, at_b = batch * by_batch_a + rows // BLOCKS[0] * by_row_a, batch * by_batch_b + column // BLOCKS[1] * by_row_b
    # Read a step before they are needed: a load takes as long as a product. Beyond K there is no scale.
    scale = gl.load(scale_a_ptr + at_a, mask=rows < M, other=0.0)
    if not BESIDE:
        scale *= gl.load(scale_b_ptr + at_b)
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    for step in range(steps):
        slot = turn % STAGES
        mbarrier.wait(full.index(slot), turn // STAGES & 1)
        part = _product(left.index(slot * WARPGROUPS + WHO), right.index(slot))
        if not BESIDE:
            mbarrier.arrive(empty.index(slot))
            acc += part * scale[:, None]
        else:
            acc += part * scale[:, None] * beside.index(slot).load(LAYOUT)
            mbarrier.arrive(empty.index(slot))
        turn += 1
        k_a, k_b, more = (step + 1) // BLOCKS[2] * by_k_a, (step + 1) // BLOCKS[3] * by_k_b, step + 1 < steps
        scale = gl.load(scale_a_ptr + (at_a + k_a), mask=(rows < M) & more, other=0.0)
        if not BESIDE:
            scale *= gl.load(scale_b_ptr + (at_b + k_b), mask=more, other=0.0)
    return acc
