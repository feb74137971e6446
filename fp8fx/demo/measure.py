"""What is measured on a trained model beside its held-out quality: coverage and each layer's SQNR."""

from __future__ import annotations

import math

from fp8fx.demo.report import Result
from fp8fx.demo.sqnr import layer_sqnr, worst
from fp8fx.demo.tasks import Task
from fp8fx.demo.train import Run, reproducible


def measure(run: Run, task: Task) -> Result:
    """The result row of `run`: shares of FLOPs from its plan, SQNR of every FP8 layer on the first held-out batch."""
    plan = run.model.plan()
    sqnr = {} if run.diverged else _sqnr(run, task)
    name, value = worst(sqnr) or ("", math.nan)
    return Result(
        task=task.name,
        metric=task.metric,
        recipe=run.recipe,
        seed=run.seed,
        steps=len(run.losses),
        held_out_loss=run.held_out_loss,
        accuracy=run.accuracy,
        seconds=run.seconds,
        diverged=run.diverged,
        fp8_share=plan.fp8_flops_share,
        exempt_share=plan.exempt_flops / max(plan.flops, 1),
        worst_layer=name,
        worst_sqnr=value,
        losses=run.losses,
        sqnr=sqnr,
    )


def _sqnr(run: Run, task: Task) -> dict[str, float]:
    inputs, _ = next(iter(task.held_out()))
    device = next(run.source.parameters()).device
    layers = {name for name, module in run.source.named_modules() if hasattr(module, "weight")}
    specs = {row.name: row.spec for row in run.model.plan().fp8 if row.name in layers}
    with reproducible(device, run.seed):
        return layer_sqnr(run.source, specs, inputs.to(device))
