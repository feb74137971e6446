"""One model under one recipe, measured: executed coverage, and its distance from the plain model beside the oracle's.

Distances are SQNRs in dB from the plain model in float64. The oracle runs in the model's own float32: its codes are then those of
fp8fx almost always bit for bit. In float64 a single value that lies on the other side of a rounding boundary sets off a cascade
(every later quantization turns a small difference into whole steps), and two runs that are equally accurate agree to 30 dB only.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from coverage_meter import CoverageMeter, plain_flops
from models.graphs import Graphs
from models.zoo import ZOO, Case, build
from oracle import EXACT, Gradient, Oracle, compare_gradients, margin, plain, sqnr
from torch import nn

import fp8fx
from fp8fx.hooked import QUANTIZABLE
from fp8fx.plan import Plan

NEAREST = {"rounding": "nearest_even"}
# `direct` with gradients rounded to nearest, so that there is one right answer to compare with.
RECIPES: dict[str, Any] = {
    "hybrid": "hybrid",
    "direct": {"extends": "direct", "defaults": {"grad_output": NEAREST, "grad_input": NEAREST, "grad_weight": NEAREST}},
}
TOLERANCE = 0.5  # dB below the oracle, of a gradient's mean over the seeds
WORST = 1.0  # of any seed alone: one code that falls on the other side of a boundary has cost 0.63 (docs/models.md)
COVERAGE, EXEMPT = 0.95, 0.08  # at least, at most
HEAD = "lm_head"


@dataclass(frozen=True)
class Seed:
    """Output SQNR in dB of the compiled model and of the oracle, how well they agree, and every parameter's gradient."""

    fast: float
    oracle: float
    agreement: float
    gradients: list[Gradient]

    @property
    def margin(self) -> float:
        return margin(self.fast, self.oracle)


@dataclass(frozen=True)
class Measured:
    """`share`: of the non-exempt FLOPs executed in forward and backward, on two FP8 operands. `executed`, `plain`: all FLOPs.

    `idle`: layers that the plain model's forward never calls. `graphs`: what Dynamo compiled for all calls of `fast`.
    """

    case: Case
    fast: nn.Module
    graphs: Graphs
    idle: set[str]
    plan: Plan
    share: float
    executed: int
    plain: int
    seeds: list[Seed]

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def exempt_share(self) -> float:
        """Of all FLOPs, those of exempt layers other than the language model's head."""
        return sum(row.flops for row in self.plan.exempt if row.name != HEAD) / self.plan.flops

    @property
    def output(self) -> float:
        return statistics.mean(seed.fast for seed in self.seeds)

    @property
    def output_margin(self) -> float:
        return min(seed.margin for seed in self.seeds)

    @property
    def worst(self) -> Gradient:
        """The gradient that is furthest below the oracle's, of all parameters and seeds."""
        return min((g for seed in self.seeds for g in seed.gradients), key=lambda g: g.margin if g.finite else -math.inf)

    @property
    def median_gradient(self) -> float:
        return statistics.median(g.fast for seed in self.seeds for g in seed.gradients)


def _loss_scale(name: str, recipe: str) -> float:
    return ZOO[name].loss_scale if recipe == "direct" else 1.0


def measure(name: str, recipe: str, seeds: Iterable[int]) -> Measured:
    """Compile the model once; every further seed loads its weights into the same tensors."""
    first, *rest = seeds
    case, scale = build(name, first), _loss_scale(name, recipe)
    torch._dynamo.reset()
    fast = fp8fx.compile(case.model, RECIPES[recipe])
    fresh = plain(case.model, torch.float32)  # the buffers before any training forward
    with Graphs() as graphs:
        case.logits(fast)
        case.model.load_state_dict(fresh.state_dict())
        with CoverageMeter() as meter:
            loss = case.loss(case.logits(fast)) * scale
        meter.run_backward(loss)
        case.model.load_state_dict(fresh.state_dict())
        plan = fast.plan()  # type: ignore[operator]
        found = [_seed(case, fast, plan, recipe)]
        for seed in rest:
            other = build(name, seed)
            case.model.load_state_dict(other.model.state_dict())
            found.append(_seed(Case(case.name, case.model, other.inputs, other.targets), fast, plan, recipe))
    with never_called(fresh) as idle:
        total = plain_flops(lambda: case.loss(case.logits(fresh)).backward())  # type: ignore[no-untyped-call]
    return Measured(case, fast, graphs, idle, plan, meter.share(plan), meter.forward.total + meter.backward.total, total, found)


@contextlib.contextmanager
def never_called(model: nn.Module) -> Iterator[set[str]]:
    """Names of the layers whose forward nothing calls inside the context: T5's `shared` only holds the table of two others."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
    idle = set(names.values())
    hooks = [module.register_forward_hook(lambda module, *rest: idle.discard(names[module])) for module in names]
    yield idle
    for hook in hooks:
        hook.remove()


def reference_of(model: nn.Module) -> nn.Module:
    """The plain model in float64. Experts run one by one there: torch's grouped product has no float64."""
    reference: Any = plain(model)
    if getattr(getattr(reference, "config", None), "_experts_implementation", None) == "grouped_mm":
        reference.set_experts_implementation("eager")
    return reference


def _seed(case: Case, fast: nn.Module, plan: Plan, recipe: str) -> Seed:
    """One training forward and backward of the three models; `case.model` is the model that `fast` was made from."""
    scale = _loss_scale(case.name, recipe)
    reference, oracle = reference_of(case.model), Oracle(case.model, recipe, plan, dtype=torch.float32)
    fast.zero_grad()
    wanted = case.logits(reference, torch.float64)
    with oracle:
        rounded = case.logits(oracle.model)
    got = case.logits(fast)
    for logits in (wanted, rounded, got):
        (case.loss(logits) * scale).backward()
    return Seed(sqnr(wanted, got), sqnr(wanted, rounded), sqnr(rounded, got), compare_gradients(reference, oracle, fast))


def check(measured: Measured) -> None:
    """What every model must show: coverage, the oracle's accuracy, and finite gradients of the oracle's accuracy."""
    assert {row.name for row in measured.plan.not_captured} <= measured.idle
    assert measured.plan.fp8_flops_share >= COVERAGE
    assert measured.share >= COVERAGE
    assert measured.exempt_share <= EXEMPT
    assert measured.median_gradient < EXACT  # most gradients are there to be compared, and not zero everywhere
    assert measured.executed == measured.plain  # nothing ran outside the captured graph, and nothing twice
    assert measured.plan.flops <= measured.plain
    for seed in measured.seeds:
        assert seed.margin >= -TOLERANCE, (seed.fast, seed.oracle)
        assert all(g.finite for g in seed.gradients)
    assert too_far(measured.seeds) == {}


def too_far(seeds: Iterable[Seed]) -> dict[str, list[float]]:
    """The margins, one per seed, of the gradients that are too far below the oracle's: in their mean, or with one of the seeds."""
    margins: dict[str, list[float]] = {}
    for gradient in (g for seed in seeds for g in seed.gradients):
        margins.setdefault(gradient.name, []).append(gradient.margin)
    return {name: each for name, each in margins.items() if not (statistics.mean(each) >= -TOLERANCE and min(each) >= -WORST)}
