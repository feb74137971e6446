"""The norms' implementations on CUDA devices. See `fp8fx.ops.cuda`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast as norm_kernel
from fp8fx.kernels.replay import taped
from fp8fx.ops.arguments import takes
from fp8fx.ops.cuda_casts import has_kernel, laid_out, rounding_of
from fp8fx.ops.norms import NormBackward, NormCast, norm_cast_reference
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import TensorSpec


@takes(NormCast)
def norm_cast(a: NormCast) -> tuple[Tensor, ...]:
    if not has_kernel(a.x, TensorSpec.parse(a.spec)) or not a.x.numel():
        return norm_cast_reference(*a)
    return make_anchor(a.x.shape, a.x.dtype, a.x.device), *_norm_cast(*a)


@taped
@takes(NormCast)
def _norm_cast(a: NormCast) -> tuple[Tensor, ...]:
    """s, q, qt, scale, mean, rstd."""
    x, parsed, nothing = a.x, TensorSpec.parse(a.spec), a.x.new_empty(0, dtype=torch.float32)
    current = parsed.scaling == "current"
    made = x.new_empty(1, dtype=torch.float32) if current else nothing
    options: dict[str, Any] = {
        "scale": a.scale if parsed.scaling == "delayed" else None, "layout": a.layout, "how": rounding_of(parsed, a.rng, a.site, "input"),
        "round_first": a.kind == "rms_rounded", "record": a.record, "current": current, "made_scale": made if current else None,
        "power_of_two": parsed.power_of_two, "scale_eps": parsed.eps,
    }  # fmt: skip
    matrix, s = as_matrix(x), x.new_empty(0)
    norm = a.weight, a.bias, parsed.format, "layer" if a.kind == "layer" else "rms", a.eps
    if a.residual is None:
        pair, mean, rstd = norm_kernel(matrix, *norm, **options)
    else:
        s, pair, mean, rstd = add_norm_cast(matrix, as_matrix(a.residual), *norm, **options)
    rows = (*x.shape[:-1], 1)
    q, qt = laid_out(matrix, *pair)
    shaped = q if a.layout == "transposed" else q.view(x.shape), s if a.residual is None else s.view(x.shape)
    return shaped[1], shaped[0], qt, made.view(()) if current else made, nothing if mean is None else mean.view(rows), rstd.view(rows)


@takes(NormBackward)
def norm_backward(a: NormBackward) -> tuple[Tensor, Tensor, Tensor]:
    of_weight, of_bias = (a.x.new_empty(0) if part is None else part.new_empty(part.shape) for part in (a.weight, a.bias))
    _, dx = norm_backward_cast(
        as_matrix(a.grad), as_matrix(a.x), a.weight, a.mean if a.kind == "layer" else None, a.rstd, None,
        add=None if a.add is None else as_matrix(a.add), round_first=a.kind == "rms_rounded",
        weight_grad=None if a.weight is None else of_weight, bias_grad=None if a.bias is None else of_bias,
    )  # fmt: skip
    assert dx is not None
    return dx.view(a.x.shape), of_weight, of_bias
