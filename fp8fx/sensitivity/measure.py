"""`fp8fx.sensitivity`: the order in which a study is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fp8fx.compile import RecipeLike
from fp8fx.errors import ModelError
from fp8fx.plan import formats_of
from fp8fx.recipe import Recipe
from fp8fx.sensitivity import batches as data_of
from fp8fx.sensitivity.budget import Budget
from fp8fx.sensitivity.figures import HIGH as LAST
from fp8fx.sensitivity.figures import LOW as FIRST
from fp8fx.sensitivity.figures import Collector, Figures, Opened, describe_format
from fp8fx.sensitivity.reads import of_layer, reads
from fp8fx.sensitivity.result import LayerResult, RoleResult, Sensitivity
from fp8fx.sensitivity.study import Study, Variant

T = TypeVar("T")


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    recipe: RecipeLike = "hybrid",
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    gradients: bool = True,
    switch_off: bool = True,
    budget: Any = None,
    exempt: Sequence[Any] = (),
    output_fused: Sequence[Any] = (),
    capture: str = "dynamo",
    progress: bool = False,
) -> Sensitivity:
    """What `recipe` does to each layer of `model`: SQNR, underflow and overflow by role, and the effect on the loss of each layer alone.

    data: an iterable of batches, read once and kept; the first `batches` of them, or all. loss: a function of a model and a batch that
    returns a scalar; by default the model's own, or that of pairs (inputs, target) (fp8fx.sensitivity.batches). Losses are means over the
    batches, in eval mode, with fixed random numbers. The model, its buffers, modes and gradients stay as they are.
    gradients: look at the gradient roles too, with one backward per batch. switch_off: also measure the loss with all layers but one in
    FP8, for each. budget: also `suggest` a recipe that meets it. exempt, output_fused: as in fp8fx.compile. progress: a bar on stderr.

    For N layers it runs each batch 2 N + 4 times (N + 4 without switch_off). Delayed scales are calibrated on the batches first.
    Raises ModelError for data, a loss or a budget that cannot be used, and for a recipe that leaves no layer in FP8; and what
    fp8fx.compile raises.
    """
    loaded = Recipe.load(recipe).with_overrides(exempt=exempt, output_fused=output_fused)
    wanted = None if budget is None else Budget.parse(budget)
    study = Study(model, loaded, data_of.check_loss(loss), data_of.take(data, batches), capture)
    layers = study.layers()
    if not layers:
        raise ModelError(f"no layer runs in FP8 under recipe {loaded.name!r}, so there is nothing to measure: {_why(study)}")
    notes = list(study.plan.notes)
    gradients = gradients and _has_gradients(study, notes)
    study.calibrate(gradients)
    figures = _figures(study, gradients)
    shared = reads(study.runtime.stage("insert_qdq", index) for index in range(len(study.runtime.graphs)))
    full = study.loss(Variant())
    found = []
    for name, rows in _tracked(list(layers.items()), progress):
        alone = study.loss(Variant(kept=frozenset([name])))
        without = study.loss(Variant(kept=frozenset(layers) - {name})) if switch_off else None
        roles = [_role(role, figures[key]) for role, key in of_layer(name, figures, shared).items()]
        formats = "; ".join(dict.fromkeys(formats_of(row.spec) for row in rows))
        found.append(LayerResult(name, ", ".join(dict.fromkeys(row.op for row in rows)), formats, roles, alone, without))
    result = Sensitivity(study, found, full, notes)
    if wanted is not None:
        result.suggest(wanted)
    return result


def _why(study: Study) -> str:
    reasons = dict.fromkeys(f"{row.name}: {row.decision}, {row.reason}" for row in study.plan.rows)
    return f"{study.plan.summary}. " + "; ".join(list(reasons)[:4]) + ("; ..." if len(reasons) > 4 else "")


def _has_gradients(study: Study, notes: list[str]) -> bool:
    if not study.trainable():
        notes.append("gradients were not looked at: no parameter requires one")
        return False
    study.check_gradients()
    return True


def _figures(study: Study, gradients: bool) -> dict[tuple[str, str], Figures]:
    """Every quantization of a forward (and backward) pass per batch, with all layers in FP8."""
    collector = Collector()
    with study.running(Variant(stage="insert_qdq")), torch.set_grad_enabled(gradients), collector.collecting():
        for number, batch in enumerate(study.batches):
            value = data_of.scalar(study.loss_of(study.fast, batch), number)
            if gradients:
                with Opened():
                    torch.autograd.grad(value, study.trainable(), allow_unused=True)
    return collector.found


def _role(role: str, f: Figures) -> RoleResult:
    text, range_ = describe_format(f.spec)
    exponents = {e: n for e, n in zip(range(FIRST, LAST + 1), f.exponents.tolist(), strict=True) if n}
    amax = f.amax if math.isfinite(f.amax) else math.inf
    return RoleResult(role, text, f.sqnr, f.underflow, f.overflow, amax, exponents, range_)


def _tracked(items: list[T], progress: bool) -> Iterable[T]:
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description="layers", console=Console(stderr=True), transient=True)
