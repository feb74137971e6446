"""The norms' implementations on CUDA devices. See `fp8fx.ops.cuda`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast as norm_kernel
from fp8fx.kernels.replay import taped
from fp8fx.ops import norms
from fp8fx.ops.cuda_casts import has_kernel, laid_out, rounding_of
from fp8fx.ops.producers import make_anchor
from fp8fx.ops.quantize import as_matrix
from fp8fx.spec import TensorSpec


def norm_cast(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
) -> tuple[Tensor, ...]:
    parsed = TensorSpec.parse(spec)
    if not has_kernel(x, parsed) or not x.numel():
        return norms.norm_cast_reference(x, residual, weight, bias, kind, eps, spec, rng, site, scale, record, layout)
    return make_anchor(x.shape, x.dtype, x.device), *_NORM_CAST(
        x, residual, weight, bias, kind, eps, spec, rng, site, scale, record, layout
    )  # fmt: skip


def _norm_cast(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    spec: str,
    rng: Tensor | None,
    site: str,
    scale: Tensor | None,
    record: Tensor | None,
    layout: str,
) -> tuple[Tensor, ...]:
    """s, q, qt, scale, mean, rstd."""
    parsed, nothing = TensorSpec.parse(spec), x.new_empty(0, dtype=torch.float32)
    current = parsed.scaling == "current"
    made = x.new_empty(1, dtype=torch.float32) if current else nothing
    given = scale if parsed.scaling == "delayed" else None
    options: dict[str, Any] = {
        "layout": layout, "how": rounding_of(parsed, rng, site, "input"), "round_first": kind == "rms_rounded", "record": record,
        "current": current, "made_scale": made if current else None, "power_of_two": parsed.power_of_two, "scale_eps": parsed.eps,
    }  # fmt: skip
    matrix, form = as_matrix(x), "layer" if kind == "layer" else "rms"
    s = x.new_empty(0)
    if residual is None:
        pair, mean, rstd = norm_kernel(matrix, weight, bias, parsed.format, form, eps, given, **options)
    else:
        s, pair, mean, rstd = add_norm_cast(matrix, as_matrix(residual), weight, bias, parsed.format, form, eps, given, **options)
    rows = (*x.shape[:-1], 1)
    q, qt = laid_out(matrix, *pair)
    shaped = q if layout == "transposed" else q.view(x.shape), s if residual is None else s.view(x.shape)
    return shaped[1], shaped[0], qt, made.view(()) if current else made, nothing if mean is None else mean.view(rows), rstd.view(rows)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    add: Tensor | None,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    of_weight, of_bias = (x.new_empty(0) if part is None else part.new_empty(part.shape) for part in (weight, bias))
    _, dx = norm_backward_cast(
        as_matrix(grad), as_matrix(x), weight, mean if kind == "layer" else None, rstd, None,
        add=None if add is None else as_matrix(add), round_first=kind == "rms_rounded",
        weight_grad=None if weight is None else of_weight, bias_grad=None if bias is None else of_bias,
    )  # fmt: skip
    assert dx is not None
    return dx.view(x.shape), of_weight, of_bias


_NORM_CAST = taped(_norm_cast)
