"""Runs a compiled model: the backend that rewrites each captured graph, and the call that feeds it its further inputs.

One Runtime belongs to one compiled model. Copying or pickling it keeps the recipe, the options and the position in the random
stream, and drops the graphs: a copy captures its own.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp8fx import pipeline
from fp8fx.autocast import CALIBRATING, OFF
from fp8fx.capture import dynamo, symbolic
from fp8fx.capture.graph import Captured
from fp8fx.capture.layers import boundary_layers, module_types
from fp8fx.capture.naming import Numbering
from fp8fx.capture.sites import fused_inference
from fp8fx.clone import base_class, check_materialized, check_state
from fp8fx.distributed import Processes, active_ddp, state_alone, whole_graphs
from fp8fx.entries import unmatched
from fp8fx.errors import CaptureError, FP8Warning, RecipeError
from fp8fx.fastpath import WITHOUT_FASTPATH, hides_layers
from fp8fx.graph_call import GraphCall, GraphRecord, SharedGraph, Version, alive
from fp8fx.hooked import Hooks
from fp8fx.inner import compiled_inner
from fp8fx.monitor import UnderflowMonitor
from fp8fx.options import Options
from fp8fx.passes.contract import Context
from fp8fx.passes.lower import WeightInput
from fp8fx.plan import Plan, build_plan, site_rows
from fp8fx.recipe import Recipe
from fp8fx.records import Records
from fp8fx.scaling import ScalingState, is_scaling, other_recipe
from fp8fx.shards import Shards
from fp8fx.state import OPTIMIZER_STEPS, Stream, WeightCache
from fp8fx.watch import ScalingWatch, underflow_advice

LOG = logging.getLogger("fp8fx")


_NO_LAST = (
    "boundary.last was not applied: the model was captured as several graphs, and none that has a layer is known to end its forward; "
    "name the last layer in a rule or under exempt"
)


class Runtime:
    """See the module docstring. `attach` ties it to its model; `backend` is what torch.compile calls."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.stream = Stream(seed=recipe.seed)
        self.scaling = ScalingState(recipe.delayed)
        self.original: nn.Module | None = None  # the model passed to compile; a copy has none
        self._reset()

    def _reset(self) -> None:
        self.graphs: list[GraphRecord] = []
        self.numbering = Numbering()
        self.weights = WeightCache()
        self.records: list[Records] = []  # of the graphs that run on kernels
        self.watch = ScalingWatch(self.scaling)
        self.processes = Processes()
        self.shards = Shards()
        self._recomputed = False  # a training forward ran in a backward: a reentrant checkpoint is around the model
        self.monitor = UnderflowMonitor({}, underflow_advice(self.recipe))
        self._first_layer: str | None = None
        self._hides_layers = False
        self._hooks = Hooks(self.options.capture)
        self._stepped = self._reported = False  # reported: the one line after the first call
        self._root: weakref.ref[nn.Module] | None = None
        self._forward: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "options": self.options, "stream": self._position(), "scaling": self.scaling_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = dict(state)
        scaling = kept.pop("scaling")
        self.__dict__.update(kept)
        self.original = None
        self.scaling = ScalingState(self.recipe.delayed)
        self._reset()
        self.scaling.load(scaling)

    # -- the model ------------------------------------------------------------------------------------------------------

    def attach(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        OPTIMIZER_STEPS.listen(self)

    @property
    def root(self) -> nn.Module:
        root = self._root() if self._root is not None else None
        if root is None:
            raise CaptureError("the compiled model this graph belongs to is gone")
        return root

    def parameters(self) -> list[nn.Parameter]:
        root = self._root() if self._root is not None else None
        return [] if root is None else list(root.parameters())

    def optimizer_stepped(self) -> None:
        self._fold()
        self.processes.merge(self.scaling)
        self._stepped = self.scaling.due = True
        self.weights.clear()
        self.watch.optimizer_stepped()

    # -- capture --------------------------------------------------------------------------------------------------------

    def backend(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """torch.compile calls this with each captured graph; what it returns runs in the graph's place."""
        if not self.options.plan_only:
            check_materialized(self.root)
        dynamo.guard_hooks()
        if self._forward is not None and not self._hides_layers and any(map(fused_inference, module.graph.nodes)):
            self._hides_layers = True  # a module that came later, or lies in no list of modules: the next call sees its layers
            return module.forward
        return SharedGraph(self, module, example_inputs)

    def _weak_backend(self) -> Callable[..., Any]:
        """`backend` without a reference to this Runtime: Dynamo's caches keep it for as long as the class of the model lives."""
        reference = weakref.ref(self)

        def fp8fx(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return alive(reference).backend(module, example_inputs)

        return fp8fx

    def rewrite(
        self, captured: Captured, example_inputs: Sequence[Any], add_input: Callable[[fx.Graph, str], fx.Node]
    ) -> Callable[..., Any]:
        """Run the pipeline on a captured graph and compile the result with the inner compiler."""
        complete = captured.complete and not self.graphs
        layers = boundary_layers(captured.graph)
        first = captured.starts or self._first_layer in (None, *layers[:1])
        if layers and self._first_layer is None:
            self._first_layer = layers[0]
        recipe = self.recipe.with_boundary(first=first, last=captured.ends)
        where = next((x.device for x in example_inputs if isinstance(x, Tensor) and x.is_cuda), torch.device("cpu"))
        eager, cuda_graphs = self.options.inner == "eager", self.options.cuda_graphs
        context = Context(recipe, module_types(self.root), complete, add_input, eager=eager, cuda_graphs=cuda_graphs)
        context = context.on(where, self.trains())
        compiled = pipeline.run(captured, context, "annotate" if self.options.plan_only else "lower")
        record = GraphRecord(captured, context, compiled, site_rows(compiled.annotated), bool(layers))
        self._hooks.captured(self.root, (row.name for row in record.rows))
        if self.options.plan_only:
            self.graphs.append(record)
            return captured.module
        call = self._graph_call(compiled.module, example_inputs, example_inputs)
        self.graphs.append(record)  # only now: Dynamo may interrupt the inner compiler, and capture anew
        self.monitor.formats.update({row.name: row.grad_format for row in record.rows if row.grad_format})
        return Version(self, record, call)

    def make(self, record: GraphRecord, mode: str, inside: bool, inputs: Sequence[Any], examples: Sequence[Any]) -> GraphCall:
        """The graph of `record` as fp8fx.autocast's `mode` runs it, with its weights quantized `inside` or outside of it.

        examples: `inputs` for the inner compiler, symbolic where sizes are.
        """
        modes: dict[str, dict[str, Any]] = {CALIBRATING: {"calibrating": True}, OFF: {"recipe": Recipe.load("none")}}
        changes = {"weights_inside": inside} | modes.get(mode, {})
        module = pipeline.run(record.captured, dataclasses.replace(record.context, **changes)).module
        return self._graph_call(module, inputs, examples, mode == CALIBRATING)

    def _graph_call(self, module: fx.GraphModule, inputs: Sequence[Any], examples: Sequence[Any], calibrating: bool = False) -> GraphCall:
        call = GraphCall(self, module, inputs, calibrating)
        call.inner = compiled_inner(module, [*examples, *dynamo.static(call.extras(inputs))], self.options)
        return call

    # -- calls ----------------------------------------------------------------------------------------------------------

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a compiled model. What is captured on the way is reported once."""
        if self._root is None or self._root() is not root:
            self._reset()
            self.attach(root)
        if self.shards.waiting:
            self.shards.give_up()
        forward = self._forward or self._compile(root)
        try:
            if self._hides_layers:
                with WITHOUT_FASTPATH, whole_graphs():
                    result = forward(*args, **kwargs)
            elif active_ddp() is not None:
                with whole_graphs():
                    result = forward(*args, **kwargs)
            else:
                result = forward(*args, **kwargs)
        except Exception as error:
            return self._failed(root, error, args, kwargs)
        if not self._reported:
            self._reported = True
            self._report()
        return result

    def _compile(self, root: nn.Module) -> Callable[..., Any]:
        original = base_class(root).forward.__get__(root)
        self._hides_layers = hides_layers(root)
        if self.options.capture == "symbolic":
            self._forward = symbolic.SymbolicForward(self, root, original)
        else:
            options = {"fullgraph": self.options.fullgraph, "dynamic": self.options.dynamic}
            self._forward = dynamo.compile_with(original, self._weak_backend(), **options)
        return self._forward

    def _failed(self, root: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Say what went wrong; the model's own errors pass through as they are."""
        problem = dynamo.explain(error, self.options.fullgraph)
        if problem is None:
            if not self.graphs:  # Dynamo does not look again at a frame that raised while it was captured
                self._forward = None
            raise error
        if self.options.on_capture_error != "eager" or isinstance(problem, RecipeError):
            raise problem from error
        forward = base_class(root).forward.__get__(root)
        result = forward(*args, **kwargs)  # an error of the model's own, such as a wrong shape, leaves FP8 on
        self._forward, self._reported = forward, True
        warnings.warn(f"fp8fx: {problem} Running in high precision.", FP8Warning, stacklevel=4)
        return result

    def _report(self) -> None:
        plan = self.plan()
        LOG.info("fp8fx: %s", plan.summary)
        if not plan.fp8 and self.recipe.name != "none" and not self.options.plan_only:
            warnings.warn(f"fp8fx: no layer runs in FP8: {plan.summary}. print(model.plan()) gives the reasons.", FP8Warning, stacklevel=4)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the model's own tensors: the position in the random stream, and scales that are kept."""
        # The stream last: a file that ends after it, with all weights, would look like the whole state of a recipe without scales.
        return self.scaling_state() | {"stream": self._position().tensor(torch.device("cpu"))}

    def scaling_state(self) -> dict[str, Tensor]:
        self._fold()
        if self.scaling.calibrated and self.processes.pending:  # one process may save alone: no exchange here
            return state_alone(self.scaling)
        if self.scaling.calibrated:
            self._end_calibration()
        return self.scaling.state() if self.recipe.keeps_scales else {}

    def _end_calibration(self) -> None:
        self.scaling.step(at_once=True)
        self.weights.clear()

    def _fold(self) -> None:
        """Take what kernels have left in their records."""
        for records in self.records:
            records.fold(self.scaling, self.monitor)

    def trains(self) -> bool:
        """This call may be followed by a backward pass that trains the weights."""
        return torch.is_grad_enabled() and self.root.training

    def _position(self) -> Stream:
        """Where the next training forward stands: in a new step if an optimizer has stepped since the last."""
        stream = self.stream
        return Stream(stream.seed, stream.step + 1) if self._stepped else Stream(stream.seed, stream.step, stream.call)

    def load_state(self, state: dict[str, Tensor], convert: bool = False) -> None:
        """Take what `state` gave, all of it or, with ModelError, nothing. An original checkpoint has no entries: all stays as it is.

        convert: see ScalingState.load.
        """
        self._fold()
        if not state:
            self.weights.clear()
            if not self.shards.completed:
                self.scaling.forget()
            return
        self.shards.drop()
        kept = self.check_state(state, convert)
        if kept:
            self.scaling.load(kept, convert)
        if "stream" in state:
            seed, step, call = state["stream"].tolist()
            self._stepped = step > 0 and call == 0  # no forward yet in that step: another optimizer's step still belongs to the last
            self.stream = Stream(seed, step - self._stepped, call)
        self.weights.clear()

    def check_state(self, state: dict[str, Tensor], convert: bool = False) -> dict[str, Tensor]:
        """ModelError if `load_state` would raise it; nothing is changed. The entries of delayed scaling."""
        kept = {key: value for key, value in state.items() if is_scaling(key)}
        stream = {"stream": self._position().tensor(torch.device("cpu"))}
        check_state({key: value for key, value in state.items() if key not in kept}, stream, self.recipe.name)
        if bool(kept) != self.recipe.keeps_scales:
            there, here = ("holds", "keeps none") if kept else ("holds no", "keeps them")
            raise other_recipe(f"it {there} delayed scales, and recipe {self.recipe.name!r} {here}")
        if kept:
            self.scaling.check(kept, convert)
        return kept

    def unmatched(self, state: dict[str, Tensor], modules: Container[str]) -> tuple[list[str], list[str]]:
        return unmatched(state, modules)

    def begin_call(self, calibrating: bool) -> bool:
        """Advance the step if an optimizer stepped since the last training forward. True if this call's amax counts.

        Steps of the random stream ask for gradients only, those of the scales for train() too: evaluation leaves scales as they are.
        """
        training = torch.is_grad_enabled()
        self.stream.process = self.processes.enter(self._root)
        if self._stepped and training:
            self._stepped = False
            self._fold()
            self.stream.step += 1
            self.stream.call = 0
            self.monitor.end_step()
        if not self.scaling.slots:
            return False
        if self.scaling.calibrated and not calibrating:
            self.processes.merge(self.scaling)
            self._end_calibration()
        if training and not calibrating:
            self.watch.forward(self.root.training)
        training = training and self.root.training
        again = torch._C._current_graph_task_id() != -1  # a recomputation: it must see the scales its forward saw
        self._recomputed |= training and again
        if self.scaling.due and not again and (training or (self._recomputed and self.root.training)):
            self.scaling.step()
            self.weights.clear()
        return self.processes.recording(training or calibrating)

    def keeps_weights(self, wanted: WeightInput) -> bool:
        """Quantized weights are kept under no_grad and in eval, and until the next optimizer step if the recipe says so."""
        return not torch.is_grad_enabled() or not self.root.training or wanted.cache == "step"

    def plan(self) -> Plan:
        rows, skips = [record.rows for record in self.graphs], [record.compiled.skips for record in self.graphs]
        ends = [record.captured.ends for record in self.graphs if record.layered]
        notes = [_NO_LAST] if self.recipe.boundary.last and ends and not any(ends) else []
        return build_plan(rows, skips, self.root, self.recipe, notes, self._hooks.now(self.root))

    def stage(self, stage: str, index: int = 0) -> fx.GraphModule:
        """Graph `index` of the model after `stage`, made again from what was captured."""
        pipeline.check_stage(stage)
        if not self.graphs:
            raise CaptureError("nothing is captured yet: call the model once, or use fp8fx.plan(model, recipe, example_inputs=...)")
        if not 0 <= index < len(self.graphs):
            raise CaptureError(f"there is no graph {index}: the model was captured as {len(self.graphs)} graph(s), numbered from 0")
        record = self.graphs[index]
        return pipeline.run(record.captured, record.context, stage).module
