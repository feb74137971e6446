"""A small set of launches for compute-sanitizer: `compute-sanitizer --tool memcheck python tests/kernels/sanitize.py GROUP`.

Groups: `casts`, `joins` (what sums over lanes: norms and gradients of biases), `products`, `specialized`, products whose warps have
different work, and `forms`, the other forms of casts and activations, and arithmetic step by step. Sizes are odd, tiles are cut at every
edge.
Without PyTorch's caching, each tensor is an allocation of its own, whose end the tool guards. See test_sanitizer.py.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.amax import amax_each
from fp8fx.kernels.arithmetic_mm import Grid, arithmetic_mm
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.delayed import delayed_update
from fp8fx.kernels.layout import empty_transposed
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast
from fp8fx.kernels.round_values import round_values
from fp8fx.kernels.scale import compute_scale
from fp8fx.kernels.scaled_mm import scaled_mm
from fp8fx.kernels.scaled_mm_configs import CONFIGS


def to_device(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers made on the host, so that few kernels of PyTorch's run under the tool."""
    return torch.randn(shape).to(dtype).cuda()


def casts() -> None:
    rng, record, scale, made = torch.tensor([1, 2, 3]).cuda(), torch.zeros(3).cuda(), torch.ones(()).cuda(), torch.ones(2).cuda()
    for m, k in ((1, 1), (7, 17), (130, 132), (65, 4096)):
        x = to_device(m, k)
        for how in (Rounding(), Rounding("stochastic", "nonfinite", rng, 7)):
            for layout in ("rows", "both"):
                cast(x, "e4m3fn", scale, layout=layout, how=how, record=record, counts=True)
        cast_current(x, "e5m2", layout="both", record=record)
        cast_current(x, "e5m2", "row", "column", "both")
        cast_block(x, "e4m3fn", (1, 128), layout="both")
        amax_each(x, ("tensor", "row", "column"))
        u, dy = to_device(m, k), to_device(m, k)
        activation_cast(x, u, "silu", "e4m3fn", activation_amax(x, u, "silu"), from_amax=True, made_scale=made, record=record, counts=True)
        amaxes = activation_backward_amax(dy, x, u, "gelu")
        activation_backward_cast(dy, x, u, "gelu", "e5m2", *amaxes, from_amax=True, made_scale=made, made_scale_u=made)
    delayed_update(torch.ones(5, 17).cuda(), torch.ones(5).cuda(), torch.ones(5).cuda(), torch.ones(5).cuda())


def joins() -> None:
    scale, made = torch.ones(()).cuda(), torch.ones(2).cuda()
    for m, k in ((1, 1), (7, 17), (70, 132), (33, 9000)):
        x, add, weight, bias = to_device(m, k), to_device(m, k), to_device(k), to_device(k)
        out = [torch.empty(k).cuda() for _ in range(3)]
        cast(x, "e5m2", scale, layout="both", bias_grad=out[0])
        activation_backward_cast(x, x, add, "silu", "e5m2", scale, scale, bias_grad=out[0], bias_grad_u=out[1])
        for kind in ("layer", "rms"):
            norm_cast(x, weight, bias, "e4m3fn", kind, current=True, made_scale=made)
            _, _, mean, rstd = add_norm_cast(x, add, weight, bias, "e4m3fn", kind, scale=scale)
            grads = {"weight_grad": out[0], "bias_grad": out[1], "row_sum": out[2]}
            norm_backward_cast(x, x, weight, mean, rstd, "e5m2", add=add, write=True, current=True, made_scale=made, **grads)


def products() -> None:
    rng, record, one = torch.tensor([1, 2, 3]).cuda(), torch.zeros(3).cuda(), torch.ones(()).cuda()
    for m, n, k in ((1, 40, 64), (7, 17, 33), (200, 150, 150), (256, 512, 256)):
        a, b = to_device(m, k).to(torch.float8_e4m3fn), to_device(n, k).to(torch.float8_e5m2).t()
        for accumulate in ("fast", "precise"):
            scaled_mm(a, b, one, one, to_device(n), accumulate=accumulate, activation="gelu", record=record)
        how = Rounding("stochastic", "nonfinite", rng, 7)
        scaled_mm(a, b, torch.ones(m, 1).cuda(), torch.ones(1, n).cuda(), out_format="e5m2", how=how, record=record)
        scales = torch.ones(m, (k + 127) // 128).cuda(), torch.ones((k + 127) // 128, n).cuda()
        scaled_mm(a, b, *scales, block_a=(1, 128), block_b=(128, 1))


def specialized() -> None:
    rng, record, one = torch.tensor([1, 2, 3]).cuda(), torch.zeros(3).cuda(), torch.ones(()).cuda()
    how = Rounding("stochastic", "nonfinite", rng, 7)
    a, b = to_device(300, 272).to(torch.float8_e4m3fn), to_device(520, 272).to(torch.float8_e5m2).t()
    scaled_mm(a, b, one, one, accumulate="precise", round_to="e5m2", how=how, config=CONFIGS["specialized"])
    scales = torch.ones(300, 3).cuda(), torch.ones(3, 5).cuda()
    scaled_mm(a, b, *scales, block_a=(1, 128), block_b=(128, 128), record=record, config=CONFIGS["specialized_blocked"])
    scales = torch.ones(300, 3).cuda(), torch.ones(3, 520).cuda()
    scaled_mm(a, b, *scales, block_a=(1, 128), block_b=(128, 1), config=CONFIGS["specialized_blocked"])


def forms() -> None:
    rng, record, scale = torch.tensor([1, 2, 3]).cuda(), torch.zeros(3).cuda(), torch.ones(()).cuda()
    for m, k in ((7, 17), (66, 132)):
        x = to_device(m, k)
        for how in (Rounding(), Rounding("stochastic", "nonfinite", rng, 7)):
            cast_current(x, "e4m3fn", "row", how=how, record=record)
            cast_current(x[:, k // 3 :], "e5m2", "row", how=how)
            round_values(x, "e5m2", scale, how, record)
            round_values(x, "e4m3fn", None, how, record, current=True)
        for block, other in (((1, 128), (128, 1)), ((64, 64), (1, 64)), ((32, 1), (32, 32))):
            cast_block(x, "e4m3fn", block, other, "both", power_of_two=True)
        cast_block(x.t(), "e5m2", layout="both", power_of_two=True)
        compute_scale(x.float().abs(), "e4m3fn", power_of_two=True)
        _kept(x, to_device(m, k), to_device(m, k), scale)
    cast_current(to_device(3, 9001), "e4m3fn", "row")
    round_values(to_device(3, 4096), "e5m2")
    _studies()


def _kept(h: Tensor, u: Tensor, dy: Tensor, scale: Tensor) -> None:
    """Activations that keep their inputs, at once, in parts and in place, and what reads them."""
    kept, (m, k) = (Kept.empty(h), Kept.empty(u)), h.shape
    whole = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=h.device), empty_transposed((m, k), torch.float8_e4m3fn, h)
    for row in range(0, m, 32):
        rows = slice(row, row + 32)
        activation_cast(h[rows], u[rows], "silu", "e4m3fn", scale, kept=kept, into=(*whole, row))
    activation_cast(h, None, "gelu", "e4m3fn", scale, kept=(kept[0], None))
    activation_cast(h, u, "silu", "e4m3fn", scale, kept=kept)
    activation_backward_amax(dy, *kept, "silu")
    activation_backward_cast(dy, *kept, "silu", "e5m2", scale, scale)
    activation_backward_cast(dy, *kept, "silu", "e5m2", scale, only=True)
    activation_cast(kept[0], dy, "silu", "e5m2", scale)
    activation_keep(h, u, "silu", kept)
    activation_keep(dy, None, "relu", (kept[0], None))


def _studies() -> None:
    grid = Grid(formats.get("e5m2"))
    for m, n, k in ((1, 1, 1), (7, 70, 33)):
        a, b = to_device(k, m, dtype=torch.float32), to_device(k, n, dtype=torch.float32)
        arithmetic_mm(a, None, b, None, None, "exact", grid, grid)
        arithmetic_mm(a, a, b, b, None, "exact", grid, grid, hopper=True)
        arithmetic_mm(a, a, b, b, None, "mitchell", grid, grid)
        lines = torch.randint(8, (k, m)).cuda(), torch.randint(8, (k, n)).cuda()
        arithmetic_mm(a, lines[0], b, lines[1], to_device(8, 8, dtype=torch.float32), "table", grid, grid)


if __name__ == "__main__":
    groups = {"casts": casts, "joins": joins, "products": products, "specialized": specialized, "forms": forms}
    groups[sys.argv[1]]()
    torch.cuda.synchronize()
    print("launched", sys.argv[1])
