"""One training loop for every recipe: same seeds, same batches, same initial weights; only `fp8fx.compile` differs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fp8fx
from fp8fx.demo.tasks import Task

# Fixed, because the order of a CPU reduction, and so the last bit, depends on it. One, because these models are too small to gain
# from a second, and two threads that wait for each other are 5 to 20 times slower on a machine that does anything else.
THREADS = 1
DIVERGED = 3.0  # a loss this many times the first one, or not a number, ends the run

OnStep = Callable[[int, float], None]


@dataclass(kw_only=True)
class Run:
    """What one training run gave. `model` is what fp8fx.compile returned, `source` the plain module with the same Parameters."""

    task: str
    recipe: str
    seed: int
    model: Any
    source: nn.Module
    losses: list[float] = field(default_factory=list)
    held_out_loss: float = math.nan
    accuracy: float = math.nan
    seconds: float = 0.0
    diverged: str = ""


@contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Fixed seed, thread count and, on a GPU, deterministic kernels; all but the seed are put back."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(seed)
    torch.set_num_threads(THREADS)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _share_of_lr(step: int, task: Task) -> float:
    """Linear warm-up, then a cosine from 1 down to 0.1."""
    if step < task.warmup:
        return (step + 1) / task.warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - task.warmup) / max(task.steps - task.warmup, 1))


def _problem(loss: float, first: float, step: int) -> str:
    """Why training cannot go on, or an empty string."""
    if not math.isfinite(loss):
        return f"diverged at step {step}: the loss is {loss}"
    if loss > DIVERGED * first:
        return f"diverged at step {step}: the loss is {loss:.3g}, {DIVERGED:g} times the first one or more ({first:.3g})"
    return ""


def train(
    task: Task,
    recipe: str,
    seed: int = 0,
    device: torch.device | None = None,
    on_step: OnStep | None = None,
) -> Run:
    """Train `task` under `recipe` and evaluate on its held-out data. A diverged run ends early and says so in `Run.diverged`."""
    device = device or default_device()
    with reproducible(device, seed):
        source = task.build().to(device)
        run = Run(task=task.name, recipe=recipe, seed=seed, source=source, model=fp8fx.compile(source, recipe=recipe, fullgraph=True))
        scaler = fp8fx.GradScaler(recipe=recipe, device=device.type)
        start = time.perf_counter()
        _fit(run, task, scaler, device, on_step)
        run.seconds = time.perf_counter() - start
        if not run.diverged:
            run.held_out_loss, run.accuracy = evaluate(run.model, task, device, seed)
    return run


def _fit(run: Run, task: Task, scaler: torch.amp.GradScaler, device: torch.device, on_step: OnStep | None) -> None:
    """The loop a user would write; `scaler` passes everything through where the recipe needs no loss scaling."""
    model = run.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    model.train()
    for step, (inputs, labels) in enumerate(task.batches(task.steps, run.seed)):
        loss = task.loss(model(inputs.to(device)), labels.to(device))
        run.losses.append(loss.item())
        run.diverged = _problem(run.losses[-1], run.losses[0], step)
        if run.diverged:
            return
        # Not an LRScheduler: those warn when the scaler skips the first step.
        for group in optimizer.param_groups:
            group["lr"] = task.lr * _share_of_lr(step, task)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if on_step is not None:
            on_step(step, run.losses[-1])


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, device: torch.device, seed: int) -> tuple[float, float]:
    """Mean cross entropy in nats, and share of positions where the most likely class is right, over the data that `seed` holds out."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for inputs, labels in task.held_out(seed):
        logits: Tensor = model(inputs.to(device))
        labels = labels.to(device)
        loss += task.loss(logits, labels).item() * labels.numel()
        right += int((logits.argmax(-1) == labels).sum())
        count += labels.numel()
    return loss / count, right / count
