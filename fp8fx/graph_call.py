"""Calling a rewritten graph: the version that belongs to the parameters it got, in the mode asked for, with its further inputs.

torch calls a SharedGraph with the user's inputs; it picks the Version of the modules those inputs belong to, that one the GraphCall of
the mode (fp8fx.autocast), and that one adds the meter, the rng, the scales and the quantized weights, and takes amax away. Nothing here
outlives a call but what is keyed by parameter identity.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fp8fx.autocast import FP8, mode
from fp8fx.capture import dynamo
from fp8fx.capture.graph import TENSOR_NAME, copy_graph
from fp8fx.capture.naming import RootNames
from fp8fx.errors import CaptureError
from fp8fx.ops.quantize import GRADIENTS, STATISTICS, UNMEASURED
from fp8fx.passes.contract import AMAX, GRAD_SCALES, METER, RNG, SCALES, SLOTS, Slot
from fp8fx.passes.device import GRAD_RECORDS, RECORDS
from fp8fx.passes.inputs import WRAPPED
from fp8fx.passes.lower import PARTS, WEIGHTS, WeightInput
from fp8fx.records import Records
from fp8fx.scaling import flat

if TYPE_CHECKING:
    from fp8fx.capture.graph import Captured
    from fp8fx.passes.contract import Context
    from fp8fx.pipeline import Compiled
    from fp8fx.plan import SiteRow
    from fp8fx.runtime import Runtime


# Entered around every call of a rewritten graph, by those who look at what it executes (fp8fx.coverage, fp8fx.statistics).
OBSERVERS: list[Callable[[GraphCall], contextlib.AbstractContextManager[Any]]] = []


@dataclass
class GraphRecord:
    """One captured graph of the model: enough to show any stage again, and its rows of the plan."""

    captured: Captured
    context: Context
    compiled: Compiled
    rows: list[SiteRow] = field(default_factory=list)
    layered: bool = False  # it has layers that `boundary` may mean


def alive(reference: weakref.ref[Runtime]) -> Runtime:
    """The Runtime, which only its model keeps: Dynamo's caches hold what is in this file longer than anyone holds the model."""
    runtime = reference()
    if runtime is None:
        raise CaptureError("the compiled model this graph belongs to is gone")
    return runtime


class SharedGraph:
    """A graph Dynamo may run for several modules: two blocks of one class share one, as no guard tells them apart.

    Names, and with them the recipe's decisions, differ between those blocks. So each call looks at which parameters it got, by
    identity, and runs the version that was rewritten for them.
    """

    def __init__(self, runtime: Runtime, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._runtime = weakref.ref(runtime)
        self.module = copy_graph(module)
        self.module.compile_subgraph_reason = getattr(module, "compile_subgraph_reason", None)  # type: ignore[assignment]
        self.frame, self.base = dynamo.frame_key(), dynamo.own_base()
        self.places: list[int] = []
        self.by_names: dict[tuple[str, ...], Callable[..., Any]] = {}
        self.by_identity: dict[tuple[int, ...], tuple[Callable[..., Any], list[weakref.ref[Any]]]] = {}
        self.first: Callable[..., Any] = self._rewrite(example_inputs)
        self._remember(example_inputs, self.first)

    @property
    def runtime(self) -> Runtime:
        return alive(self._runtime)

    def __call__(self, *args: Any) -> Any:
        known = self.by_identity.get(tuple(map(id, map(args.__getitem__, self.places))))  # as _identity, which costs a call
        return (self._meet(args) if known is None else known[0])(*args)

    def _identity(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(id(args[place]) for place in self.places)

    def _meet(self, args: Sequence[Any]) -> Callable[..., Any]:
        """Parameters not seen before: those of other names get a version of their own.

        Tensors under names already seen (a parameter was replaced, or torch.func.functional_call has put one in its place) run
        the version of those names; tensors that are none of the model's run the first.
        """
        names = RootNames(self.runtime.root)
        found = [names.of_tensor(args[place]) for place in self.places]
        if not all(found):
            return self.first
        made = next((call for seen, call in self.by_names.items() if _are(found, seen)), None) or self._rewrite(args)
        self._remember(args, made)
        return made

    def _remember(self, args: Sequence[Any], call: Callable[..., Any]) -> None:
        """Until one of the parameters is gone: its identity may be another's then."""
        key, known = self._identity(args), self.by_identity
        known[key] = (call, [weakref.ref(args[place], lambda _: known.pop(key, None)) for place in self.places])

    def _rewrite(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = dynamo.from_dynamo(self.module, inputs, self.runtime.root, self.runtime.numbering, self.frame, self.base)
        placeholders = captured.graph.find_nodes(op="placeholder")
        self.places = [i for i, node in enumerate(placeholders) if node.meta[TENSOR_NAME]]
        made = self.runtime.rewrite(captured, inputs, dynamo.append_placeholder)
        self.by_names.setdefault(tuple(placeholders[i].meta[TENSOR_NAME] for i in self.places), made)
        return made


def _are(found: list[list[str]], seen: tuple[str, ...]) -> bool:
    return len(found) == len(seen) and all(name in names for names, name in zip(found, seen, strict=True))


class Version:
    """One graph rewritten for one set of parameters: in FP8, and as fp8fx.autocast asks for it, made when it first does."""

    def __init__(self, runtime: Runtime, record: GraphRecord, first: GraphCall) -> None:
        self._runtime = weakref.ref(runtime)
        self.record, self.cuda = record, record.context.device == "cuda"
        self.later = dynamo.Later(record.captured.graph)
        self.made = {(FP8, record.context.weights_inside): first}

    def __call__(self, *args: Any) -> Any:
        name = mode()
        wanted = (name, self.cuda and name == FP8 and (self._runtime() or alive(self._runtime)).trains())
        call = self.made.get(wanted) or self._make(wanted, args)
        return call(*args)

    def _make(self, wanted: tuple[str, bool], args: Sequence[Any]) -> GraphCall:
        with self.later:
            return self.made.setdefault(wanted, alive(self._runtime).make(self.record, *wanted, args, self.later.inputs(args)))


class GraphCall:
    """One rewritten graph as torch calls it: the user's inputs, then the further inputs of fp8fx.passes.inputs, then weights."""

    def __init__(self, runtime: Runtime, module: fx.GraphModule, inputs: Sequence[Any] = (), calibrating: bool = False) -> None:
        """inputs: those it was made for. Of the weights, parameters and the buffers among these are the model's own, and kept."""
        self._runtime = weakref.ref(runtime)
        self.inner: Callable[..., Any] = module
        self.calibrating = calibrating
        placeholders = module.graph.find_nodes(op="placeholder")
        position = {node.name: i for i, node in enumerate(placeholders)}
        self.names = [node.meta["extra"] for node in placeholders if "extra" in node.meta]
        self.sites: list[str] = module.meta.get(SLOTS, [])
        self.scales = _Rows(module.meta.get(SCALES, []), runtime)
        self.grad_scales = _Rows(flat(module.meta.get(GRAD_SCALES, [])), runtime)
        self.amax = _Rows(module.meta.get(AMAX, []), runtime)
        sites: list[int] = module.meta.get(GRAD_RECORDS, [])
        gradients = module.meta.get(GRAD_SCALES, [])
        self.records = Records(
            module.meta.get(RECORDS, []),
            [self.sites[site] for site in sites],
            [gradients[site] for site in sites] if gradients else [],
            runtime.scaling,
        )
        if self.records.size:
            runtime.records.append(self.records)
        self.wrapped: bool = module.meta.get(WRAPPED, False)
        self.weights: list[tuple[int, WeightInput]] = [(position[w.placeholder], w) for w in module.meta.get(WEIGHTS, [])]
        buffers = {id(buffer) for buffer in runtime.root.buffers()} if self.weights and inputs else set()
        self.buffers: list[weakref.ref[Any] | None] = [
            weakref.ref(inputs[place]) if buffers and id(inputs[place]) in buffers else None for place, _ in self.weights
        ]

        # Nothing of it runs in FP8: a layer that FP8 would not make faster must not pay for it either.
        self.plain = not (self.names or self.weights or self.amax.slots or self.scales.slots or self.records.size)

    @property
    def runtime(self) -> Runtime:
        return alive(self._runtime)

    def __call__(self, *args: Any) -> Any:
        runtime = self._runtime() or self.runtime
        recording = runtime.begin_call(self.calibrating)
        if self.plain and not OBSERVERS:
            runtime.stream.call += 1
            return self.inner(*args)
        if self.scales.slots and not recording and not runtime.root.training:
            runtime.watch.evaluation(self.scales)
        with contextlib.ExitStack() as stack:
            for observe in OBSERVERS:
                stack.enter_context(observe(self))
            extras = self.extras(args, recording)
            runtime.stream.call += 1
            result = self.inner(*args, *extras)
        if not self.amax.slots:
            return result
        *own, amax = result
        if recording:
            runtime.scaling.merge(self.amax.on(amax.device), amax, self.amax.rows)
            runtime.scaling.calibrated |= self.calibrating
        return own[0] if self.wrapped else tuple(own)

    def extras(self, args: Sequence[Any], recording: bool = False) -> list[Tensor]:
        """The values of the further inputs for one call."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = next((a.device for a in (*(a for a in tensors if a.is_cuda), *tensors)), torch.device("cpu"))
        runtime, found = self.runtime, dict[str, Tensor]()
        if METER in self.names:
            found[METER] = self._meter(device, recording)
        if RNG in self.names:
            found[RNG] = runtime.stream.tensor(device)
        if SCALES in self.names:
            found[SCALES] = runtime.scaling.read(self.scales.on(device))
        if self.records.size:
            # Without scales that are kept, every backward counts, as on the CPU: only the underflow counts are of interest.
            counts = recording if len(runtime.scaling) else torch.is_grad_enabled()
            found[RECORDS], found[GRAD_RECORDS] = self.records.inputs(device, counts)
            if counts:
                runtime.watch.backward()  # autograd says nothing of it here; kernels measure every kind of backward
        if GRAD_SCALES in self.names:
            found[GRAD_SCALES] = runtime.scaling.read(self.grad_scales.on(device).view(-1, len(GRADIENTS)))
        for index, (place, wanted) in enumerate(self.weights):
            buffer = self.buffers[index]
            own = isinstance(args[place], nn.Parameter) or (buffer is not None and args[place] is buffer())
            keep = own and runtime.keeps_weights(wanted)
            scale = found[SCALES][self.scales.slots.index(wanted.slot)] if wanted.slot is not None else None
            parts = runtime.weights.get(args[place], wanted, keep, scale)
            found |= {f"fp8_weight_{index}_{part}": value for part, value in zip(PARTS, parts, strict=True)}
        return [found[name] for name in self.names]

    def _meter(self, device: torch.device, recording: bool) -> Tensor:
        """A fresh leaf per call, so that two forwards in flight never meet; its "gradient" is what the sites' backwards measured."""
        meter = torch.zeros(len(self.sites), STATISTICS, device=device, dtype=torch.float32, requires_grad=True)
        runtime, sites, calibrating = self.runtime, self.sites, self.calibrating
        grad_scales = self.grad_scales if recording else None

        def fold(leaf: Tensor) -> None:
            if leaf.grad is None:
                return
            if not calibrating:
                runtime.monitor.fold(sites, leaf.grad[:, len(GRADIENTS) :])
            if grad_scales is not None and grad_scales.slots:
                kept, amax = grad_scales.kept(leaf.grad[:, : len(GRADIENTS)])
                # 0: the backward did not come by (autograd fills in zeros), or nothing but zeros did. Neither says anything.
                runtime.scaling.merge(kept, torch.where(amax > 0, amax, UNMEASURED), grad_scales.kept_rows)
                runtime.scaling.calibrated |= calibrating
                runtime.processes.measured()
            runtime.watch.backward()
            leaf.grad = None

        meter.register_post_accumulate_grad_hook(fold)
        return meter


class _Rows:
    """Where the scales of some slots lie in the runtime's state; None is a slot that is not there."""

    def __init__(self, slots: Sequence[Slot | None], runtime: Runtime) -> None:
        self.slots = list(slots)
        self.rows = runtime.scaling.indices(slots)
        self.places = [place for place, slot in enumerate(slots) if slot is not None]
        self.kept_rows = [self.rows[place] for place in self.places]
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            with torch.inference_mode(False):
                made = (torch.tensor(v, dtype=torch.int64, device=device) for v in (self.rows, self.places, self.kept_rows))
                self._on[device] = tuple(made)  # type: ignore[assignment]
        return self._on[device]

    def on(self, device: torch.device) -> Tensor:
        """int64 [slots]."""
        return self._tensors(device)[0]

    def kept(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and the values (of any shape, one for each slot) of those slots that are there."""
        _, places, rows = self._tensors(values.device)
        return rows, values.flatten()[places]
