"""A small set of launches for compute-sanitizer: `compute-sanitizer --tool memcheck python tests/kernels/sanitize.py GROUP`.

Groups: `casts`, `joins` (what sums over lanes: norms and gradients of biases), `products`, and `specialized`, products whose warps have
different work. Sizes are odd, tiles are cut at every edge.
Without PyTorch's caching, each tensor is an allocation of its own, whose end the tool guards. See test_sanitizer.py.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.amax import amax_each
from fp8fx.kernels.cast import Rounding, cast, cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.delayed import delayed_update
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast
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


if __name__ == "__main__":
    groups = {"casts": casts, "joins": joins, "products": products, "specialized": specialized}
    groups[sys.argv[1]]()
    torch.cuda.synchronize()
    print("launched", sys.argv[1])
