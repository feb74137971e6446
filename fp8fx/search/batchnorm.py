"""Batch norms beside quantization: folding them into the layer before, and estimating their statistics again under it.

BN(conv(x, w) + b) = conv(x, w * g / sqrt(var + eps)) + (b - mean) * g / sqrt(var + eps) + beta         in evaluation
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion, parametrize

from fp8fx.capture import symbolic
from fp8fx.capture.graph import MODULE, SITE
from fp8fx.clone import check_model
from fp8fx.compile import _arguments
from fp8fx.errors import FP8Warning
from fp8fx.recipe import Recipe
from fp8fx.search.data import Forward, batches_of, call
from fp8fx.search.taps import TapRuntime, tapped

STATISTICS = ("running_mean", "running_var")
_FUNCTIONS = (F.batch_norm, torch.batch_norm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batchnorm(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of `model` for inference, each batch norm that alone reads one convolution or linear layer folded into that layer.

    The copy has its own parameters, and nn.Identity in the place of a folded norm; in evaluation it computes what the model does, to
    rounding. The model is not changed. example_inputs: as for fp8fx.plan; the model is then captured with TorchDynamo. Without them it
    is traced symbolically.

    A norm stays where its layer is read by something else too or runs more than once, shares its weight, is parametrized or has hooks,
    where it normalizes by the batch in evaluation too, or stands across a break of the graph. A warning says so if nothing was folded.
    Raises ModelError for what fp8fx.compile cannot take, CaptureError for what cannot be captured.
    """
    check_model(model)
    pairs = [pair for graph in _graphs(model, example_inputs) for pair in _pairs(graph, model)]
    folded = copy.deepcopy(model)
    for layer, norm in pairs:
        _fold(folded, layer, norm)
    if not pairs and any(isinstance(module, _BatchNorm) for module in model.modules()):
        warnings.warn(
            "fp8fx.fold_batchnorm: the model has batch norms, and none could be folded into a layer before it", FP8Warning, stacklevel=2
        )
    return folded


def _graphs(model: nn.Module, example_inputs: Any) -> list[fx.Graph]:
    """The captured graphs of the model in evaluation mode."""
    if example_inputs is None:
        probe = copy.deepcopy(model).eval()
        captured, _ = symbolic.from_symbolic(symbolic.trace(probe), (), probe)
        return [captured.graph]
    runtime = TapRuntime(Recipe.load("none"))
    probe = tapped(model, runtime).eval()
    args, kwargs = _arguments(model, example_inputs)
    with torch.no_grad():
        probe(*args, **kwargs)
    return [record.captured.graph for record in runtime.graphs]


def _pairs(graph: fx.Graph, model: nn.Module) -> list[tuple[str, str]]:
    """(path of the layer, path of its norm) of every pair that can be folded."""
    modules = dict(model.named_modules(remove_duplicate=False))
    norms = [node for node in graph.nodes if node.op == "call_function" and node.target in _FUNCTIONS]
    calls = Counter(id(modules.get(node.meta.get(MODULE, ""))) for node in graph.nodes if SITE in node.meta)
    calls.update(Counter(id(modules.get(node.meta.get(MODULE, ""))) for node in norms))
    weights = Counter(id(p) for module in set(modules.values()) for p in module.parameters(recurse=False))
    found = []
    for node in norms:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) or SITE not in source.meta or len(source.users) != 1:
            continue
        names = source.meta.get(MODULE, ""), node.meta.get(MODULE, "")
        layer, norm = (modules.get(name) for name in names)
        if _foldable(layer, norm) and all(calls[id(m)] == 1 for m in (layer, norm)) and weights[id(layer.weight)] == 1:  # type: ignore[union-attr]
            found.append(names)
    return found


def _foldable(layer: nn.Module | None, norm: nn.Module | None) -> bool:
    """Plain modules of torch.nn with statistics: nothing else is known to compute what the formula above says."""
    if not (type(layer) in (*_CONVOLUTIONS, nn.Linear) and isinstance(norm, _BatchNorm)) or norm.running_mean is None:
        return False
    assert layer is not None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(m, name) for m in (layer, norm) for name in hooks) and not parametrize.is_parametrized(layer)


def _fold(root: nn.Module, layer_path: str, norm_path: str) -> None:
    layer: Any = root.get_submodule(layer_path)
    norm: Any = root.get_submodule(norm_path)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fusion.fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        layer.weight, layer.bias = _fused_convolution(layer, statistics)
    parent, _, name = norm_path.rpartition(".")
    setattr(root.get_submodule(parent), name, nn.Identity())


def _fused_convolution(layer: Any, statistics: tuple[Any, ...]) -> tuple[nn.Parameter, nn.Parameter]:
    """torch's own formula; a transposed convolution in groups holds its output channels as [I, O / groups]."""
    if not layer.transposed or layer.groups == 1:
        mean, var, eps, gain, shift = statistics
        return fusion.fuse_conv_bn_weights(layer.weight, layer.bias, mean, var, eps, gain, shift, layer.transposed)
    mean, var, eps, gain, shift = statistics
    gain = torch.ones_like(mean) if gain is None else gain
    shift = torch.zeros_like(mean) if shift is None else shift
    factor = gain * torch.rsqrt(var + eps)
    per_group = factor.reshape(layer.groups, 1, -1, *([1] * (layer.weight.dim() - 2)))
    weight = layer.weight.reshape(layer.groups, -1, *layer.weight.shape[1:]) * per_group
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
    made = nn.Parameter(weight.reshape(layer.weight.shape).detach(), layer.weight.requires_grad)
    return made, nn.Parameter(((bias - mean) * factor + shift).detach(), layer.weight.requires_grad)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, data: Any, *, batches: int | None = None, forward: Forward | None = None) -> int:
    """Estimate the running statistics of every batch norm again, from what reaches it now: under FP8, under QAT, after any change.

    model: compiled by fp8fx, made by fp8fx.qat, or plain. data, batches, forward: as for fp8fx.search. Each batch counts alike: running
    mean and variance become the means over batches of theirs. Everything else runs as in evaluation, and flags are put back.
    Returns the number of norms. Raises ModelError for data as fp8fx.search does, and leaves the statistics as they were if anything
    fails on the way.
    """
    found = batches_of(data, batches)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    flags = [(module, module.training) for module in model.modules()]
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    sums: list[dict[str, Tensor]] = [{} for _ in norms]
    model.eval()
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0  # each batch leaves its own statistics
        for number, batch in enumerate(found):
            call(model, batch, forward, number)
            for norm, total in zip(norms, sums, strict=True):
                for name in STATISTICS:
                    total[name] = norm.get_buffer(name).double() + total.get(name, 0.0)
        for norm, total in zip(norms, sums, strict=True):
            _restore(norm, {name: value / len(found) for name, value in total.items()})
    except BaseException:
        for norm, (_, buffers) in zip(norms, before, strict=True):
            _restore(norm, buffers)
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, flag in flags:
            module.training = flag
    return len(norms)


def _restore(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in buffers.items():
        norm.get_buffer(name).copy_(value)
