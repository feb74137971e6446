"""What is measured on a trained model beside its held-out quality: coverage and each layer's SQNR."""

from __future__ import annotations

import copy
import math

import fp8fx
from fp8fx.coverage import CoverageMeter
from fp8fx.demo.results import Result
from fp8fx.demo.sqnr import layer_sqnr, worst
from fp8fx.demo.tasks import Task
from fp8fx.demo.train import Run, reproducible
from fp8fx.spec import ROLES


def measure(run: Run, task: Task) -> Result:
    """The result of `run`: share of FLOPs from executed operands, SQNR of every FP8 layer on the first held-out batch."""
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
        fp8_share=_coverage(run, task),
        exempt_share=plan.exempt_flops / max(plan.flops, 1),
        worst_layer=name,
        worst_sqnr=value,
        losses=run.losses,
        sqnr=sqnr,
    )


def _coverage(run: Run, task: Task) -> float:
    """Share of the non-exempt FLOPs of one step whose two operands lay on the grid of a format of the plan when they ran."""
    specs = [getattr(row.spec, role) for row in run.model.plan().fp8 for role in ROLES]
    names = sorted({spec.format for spec in specs if spec is not None})
    if not names:
        return 0.0
    inputs, labels = next(iter(task.batches(1, run.seed)))
    device = next(run.source.parameters()).device
    with reproducible(device, run.seed):
        model = fp8fx.compile(copy.deepcopy(run.source).train(), run.recipe, inner="eager")
        with CoverageMeter(names) as meter:
            meter.run_backward(task.loss(model(inputs.to(device)), labels.to(device)))
        return meter.share(fp8fx.plan(model))


def _sqnr(run: Run, task: Task) -> dict[str, float]:
    inputs, _ = next(iter(task.held_out(run.seed)))
    device = next(run.source.parameters()).device
    layers = {name for name, module in run.source.named_modules() if hasattr(module, "weight")}
    specs = {row.name: row.spec for row in run.model.plan().fp8 if row.name in layers}
    with reproducible(device, run.seed):
        return layer_sqnr(run.source, specs, inputs.to(device))
