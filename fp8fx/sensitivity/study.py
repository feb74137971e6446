"""A compiled clone of a model that runs with any choice of its layers in FP8. It is captured once; a choice only runs the passes again.

    study = Study(model, recipe, loss, batches)
    study.loss(HIGH)  study.loss(Variant())  study.loss(Variant(kept={"fc1"}))     mean over the batches, eval mode, without gradients

The model itself is not touched: the clone shares its parameters and has its own buffers and modes. No loss that is measured here writes
a `.grad`, except while delayed scales are calibrated, and there the model's own is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx import pipeline
from fp8fx.autocast import FP8, autocast, mode
from fp8fx.capture.graph import Captured
from fp8fx.capture.layers import module_types
from fp8fx.clone import RUNTIME, check_materialized, check_model, clone, compiled_class
from fp8fx.errors import ModelError
from fp8fx.graph_call import GraphCall, GraphRecord, Version
from fp8fx.options import Options
from fp8fx.plan import Plan, SiteRow
from fp8fx.recipe import Decision, Recipe, Site
from fp8fx.recipe.match import Modules
from fp8fx.recipe.resolve import Resolution
from fp8fx.runtime import Runtime
from fp8fx.sensitivity.batches import Loss, high_precision_loss, scalar

HIGH = "high precision"


@dataclass(frozen=True)
class Variant:
    """One way to run the model: the layers in FP8 (None: all that the recipe puts there), or another recipe; and up to which pass."""

    kept: frozenset[str] | None = None
    recipe: Recipe | None = None
    stage: str = "lower"


@dataclass(frozen=True, eq=False, repr=False)
class Selection(Recipe):
    """A recipe of which only the layers in `kept` stay in FP8, as they are there: the cost model is not asked again."""

    kept: frozenset[str] = frozenset()

    def resolve(self, sites: Sequence[Site], modules: Modules | None = None, *, partial: bool = False) -> Resolution:
        found = super().resolve(sites, modules, partial=partial)
        out = Decision(mode="exempt", spec=None, reason="not in this variant")
        made = [
            dataclasses.replace(decision, when_not_faster="emulate") if site.name in self.kept else out
            for site, decision in zip(sites, found.decisions, strict=True)
        ]
        return Resolution(made, found.notes)


class StudyRuntime(Runtime):
    """A Runtime that runs `variant` in place of its recipe, where one is set."""

    variant: Variant = Variant()

    def rewrite(
        self, captured: Captured, example_inputs: Sequence[Any], add_input: Callable[[fx.Graph, str], fx.Node]
    ) -> Callable[..., Any]:
        version = super().rewrite(captured, example_inputs, add_input)
        assert isinstance(version, Version)
        return _Switched(self, self.graphs[-1], version)


class _Switched:
    """One captured graph: the Version the runtime made, and in its place the graph of the variant that is set."""

    def __init__(self, runtime: StudyRuntime, record: GraphRecord, version: Version) -> None:
        self.runtime, self.record, self.version = runtime, record, version
        self.made: tuple[Variant, GraphCall] | None = None  # of the last variant only: a study has hundreds

    def __call__(self, *args: Any) -> Any:
        variant = self.runtime.variant
        if mode() != FP8 or variant == Variant():
            return self.version(*args)
        if self.made is None or self.made[0] != variant:
            self.made = (variant, self._make(variant, args))
        return self.made[1](*args)

    def _make(self, variant: Variant, args: Sequence[Any]) -> GraphCall:
        context = dataclasses.replace(self.record.context, recipe=self._recipe(variant))
        with self.version.later:
            module = pipeline.run(self.record.captured, context, variant.stage).module
        call = GraphCall(self.runtime, module, args)
        call.inner = module.forward
        return call

    def _recipe(self, variant: Variant) -> Recipe:
        own = self.record.context.recipe
        if variant.recipe is not None:
            return bounded(self.record, variant.recipe)
        return own if variant.kept is None else Selection(own.name, own.origin, own._merged, variant.kept)


def bounded(record: GraphRecord, recipe: Recipe) -> Recipe:
    """`recipe` for one graph: without the ends of the model that it does not have."""
    own = record.context.recipe.boundary
    return recipe.with_boundary(first=own.first is not None, last=own.last is not None)


class Study:
    """See the module docstring. Raises what `fp8fx.compile` raises, and ModelError for a batch or a loss that cannot be used."""

    def __init__(self, model: nn.Module, recipe: Recipe, loss: Loss, batches: list[Any], capture: str = "dynamo") -> None:
        check_materialized(check_model(model))
        options = Options(inner="eager", capture=capture)
        options.check()
        recipe.check_names(module_types(model))
        self.recipe, self.loss_of, self.batches = recipe, loss, batches
        self.plain = clone(model, share_buffers=False).eval()
        self.fast = clone(model, share_buffers=False).eval()
        self.runtime = StudyRuntime(recipe, options)
        vars(self.fast)[RUNTIME] = self.runtime
        self.fast.__class__ = compiled_class(type(model))
        self.runtime.attach(self.fast)
        self.runtime._reported = True  # what a study finds is in its result, and it says itself that there is no layer in FP8
        self.baseline = self._baseline()

    def _baseline(self) -> float:
        """The loss in high precision: checked on the plain model, measured on the captured graph, as every other loss is."""
        with self._fixed(), torch.no_grad():
            for number, batch in enumerate(self.batches):
                high_precision_loss(self.loss_of, self.plain, batch, number)
        return self.loss(HIGH)

    @property
    def plan(self) -> Plan:
        return self.runtime.plan()

    def layers(self) -> dict[str, list[SiteRow]]:
        """The layers in FP8, in execution order: name -> its rows of the plan. A tied table has two."""
        found: dict[str, list[SiteRow]] = {}
        for row in self.plan.fp8:
            found.setdefault(row.name, []).append(row)
        return found

    def fp8_under(self, recipe: Recipe) -> set[str]:
        """The layers that another recipe runs in FP8, of the graphs that are captured."""
        contexts = [
            (record.captured, dataclasses.replace(record.context, recipe=bounded(record, recipe))) for record in self.runtime.graphs
        ]
        rows = [row for captured, context in contexts for row in pipeline.run(captured, context, "annotate").annotated]
        return {row.decision.name for row in rows if row.decision.mode == "fp8"}

    @contextlib.contextmanager
    def _fixed(self) -> Iterator[None]:
        """The same random numbers for every variant, in the model and in stochastic rounding; the caller's are left alone."""
        devices = sorted({p.device.index for p in self.fast.parameters() if p.is_cuda})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            self.runtime.stream.call = 0
            yield

    @contextlib.contextmanager
    def running(self, variant: Variant | str) -> Iterator[None]:
        """Inside, `fast` runs as `variant` says."""
        before = self.runtime.variant
        self.runtime.variant = Variant() if isinstance(variant, str) else variant
        try:
            with self._fixed(), autocast(enabled=variant != HIGH):
                yield
        finally:
            self.runtime.variant = before

    @torch.no_grad()
    def loss(self, variant: Variant | str) -> float:
        """The mean of the batches' losses. It may be NaN or inf in FP8."""
        with self.running(variant):
            return sum(scalar(self.loss_of(self.fast, b), n).item() for n, b in enumerate(self.batches)) / len(self.batches)

    def calibrate(self, gradients: bool) -> None:
        """Delayed scales from the batches themselves, as a training that went on would have them; nothing for other recipes."""
        if not self.recipe.keeps_scales:
            return
        with self._fixed(), autocast(calibrating=True), _grads_kept(self.fast), torch.set_grad_enabled(gradients):
            for number, batch in enumerate(self.batches):
                value = scalar(self.loss_of(self.fast, batch), number)
                if gradients:
                    value.backward()

    def trainable(self) -> list[Tensor]:
        return [p for p in self.fast.parameters() if p.requires_grad]

    def check_gradients(self) -> None:
        """ModelError if the loss of the first batch has no gradient."""
        with self.running(HIGH), torch.enable_grad():
            value = scalar(self.loss_of(self.fast, self.batches[0]), 0)
        if not value.requires_grad:
            raise ModelError(
                "the loss has no gradient: it is computed under no_grad, from detached tensors or as a Python number. Return a tensor that "
                "depends on the model's output, or measure without: gradients=False"
            )


@contextlib.contextmanager
def _grads_kept(model: nn.Module) -> Iterator[None]:
    """`.grad` of every parameter is put away inside, and is afterwards what it was."""
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad
