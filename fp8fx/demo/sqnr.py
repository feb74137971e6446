"""How far each layer's output moves when its operands are rounded, one layer at a time.

For a layer y = f(x, w) of the plain model, with x what reaches it in high precision, and Q the recipe's rounding of each role:

    SQNR = 20 log10(|y| / |y - Q_output(f(Q_input(x), Q_weight(w)))|)        in dB, norms over the whole output

It is local: the errors of earlier layers are not in x. The rounding is applied to the tensors by `fp8fx.numerics` and the layer is
then called as the plain module it is, so the figure does not depend on the graph passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fp8fx import numerics
from fp8fx.spec import SiteSpec, TensorSpec


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """20 log10(|reference| / |reference - other|): inf where they are equal, NaN where either is not finite."""
    signal, noise = reference.double().norm().item(), (reference.double() - other.double()).norm().item()
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf


def rounded(x: Tensor, spec: TensorSpec | None) -> Tensor:
    """`x` quantized and dequantized as `spec` says; x itself for None and for indices.

    Stochastic rounding is measured as nearest-even, a delayed scale as that of the tensor itself.
    """
    if spec is None or not x.is_floating_point():
        return x
    rounding = "nearest_even" if spec.stochastic else spec.rounding
    scaling = "current" if spec.scaling == "delayed" else spec.scaling
    spec = dataclasses.replace(spec, rounding=rounding, scaling=scaling)
    codes, scale, _ = numerics.quantize_tensor(x, spec)
    return numerics.dequantize_tensor(codes, scale, spec.format, spec.granularity, x.dtype)


@torch.no_grad()
def layer_sqnr(model: nn.Module, specs: Mapping[str, SiteSpec], inputs: Tensor) -> dict[str, float]:
    """SQNR in dB of every module of the plain `model` named in `specs`, on one batch of `inputs`."""
    found: dict[str, float] = {}

    def measure(name: str, spec: SiteSpec) -> None:
        module = model.get_submodule(name)
        weight = module.get_parameter("weight")

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weights = {"weight": rounded(weight, spec.weight)}
            handle.remove()  # the call below must not come back here
            y = torch.func.functional_call(module, weights, (rounded(args[0], spec.input), *args[1:]))
            found[name] = sqnr_db(output, rounded(y, spec.output))

        handle = module.register_forward_hook(hook)
        handles.append(handle)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    training = model.training
    model.eval()
    try:
        for name, spec in specs.items():
            measure(name, spec)
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return found


def worst(values: Mapping[str, float]) -> tuple[str, float] | None:
    """The layer with the lowest SQNR (NaN counts as lowest), or None where nothing was measured."""
    if not values:
        return None
    return min(values.items(), key=lambda item: (not math.isnan(item[1]), item[1]))
