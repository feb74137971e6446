"""Calling a rewritten graph: the version that belongs to the parameters it got, with its further inputs.

torch calls a SharedGraph with the user's inputs; it picks the GraphCall of the modules those inputs belong to, and that one adds
the meter, the rng and the quantized weights. Nothing here outlives a call but what is keyed by parameter identity.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fp8fx.capture import dynamo
from fp8fx.capture.graph import TENSOR_NAME, copy_graph
from fp8fx.capture.naming import RootNames
from fp8fx.errors import CaptureError
from fp8fx.ops.quantize import STATISTICS
from fp8fx.passes.contract import METER, RNG
from fp8fx.passes.insert_qdq import SLOTS
from fp8fx.passes.lower import WEIGHTS, WeightInput

if TYPE_CHECKING:
    from fp8fx.runtime import Runtime


# Entered around every call of a rewritten graph: dispatch modes that look at what it executes (fp8fx.coverage).
OBSERVERS: list[Callable[[], contextlib.AbstractContextManager[Any]]] = []


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
        known = self.by_identity.get(self._identity(args))
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


class GraphCall:
    """One rewritten graph as torch calls it: the user's inputs, then the meter, the rng and the quantized weights."""

    def __init__(self, runtime: Runtime, module: fx.GraphModule, inputs: Sequence[Any] = ()) -> None:
        """inputs: those it was made for. Of the weights, parameters and the buffers among these are the model's own, and kept."""
        self._runtime = weakref.ref(runtime)
        self.inner: Callable[..., Any] = module
        placeholders = module.graph.find_nodes(op="placeholder")
        position = {node.name: i for i, node in enumerate(placeholders)}
        self.names = [node.meta["extra"] for node in placeholders if "extra" in node.meta]
        self.slots: list[str] = module.meta.get(SLOTS, [])
        self.weights: list[tuple[int, WeightInput]] = [(position[w.placeholder], w) for w in module.meta.get(WEIGHTS, [])]
        buffers = {id(buffer) for buffer in runtime.root.buffers()} if self.weights and inputs else set()
        self.buffers: list[weakref.ref[Any] | None] = [
            weakref.ref(inputs[place]) if buffers and id(inputs[place]) in buffers else None for place, _ in self.weights
        ]

    @property
    def runtime(self) -> Runtime:
        return alive(self._runtime)

    def __call__(self, *args: Any) -> Any:
        self.runtime.begin_call()
        extras = self.extras(args)
        self.runtime.stream.call += 1
        if not OBSERVERS:
            return self.inner(*args, *extras)
        with contextlib.ExitStack() as stack:
            for observe in OBSERVERS:
                stack.enter_context(observe())
            return self.inner(*args, *extras)

    def extras(self, args: Sequence[Any]) -> list[Tensor]:
        """The values of the further inputs for one call."""
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        found: dict[str, Tensor] = {}
        if METER in self.names:
            found[METER] = self._meter(device)
        if RNG in self.names:
            found[RNG] = self.runtime.stream.tensor(device)
        for index, (place, wanted) in enumerate(self.weights):
            buffer = self.buffers[index]
            own = isinstance(args[place], nn.Parameter) or (buffer is not None and args[place] is buffer())
            keep = own and self.runtime.keeps_weights(wanted)
            q, scale = self.runtime.weights.get(args[place], wanted, keep)
            found[f"fp8_weight_{index}_q"], found[f"fp8_weight_{index}_scale"] = q, scale
        return [found[name] for name in self.names]

    def _meter(self, device: torch.device) -> Tensor:
        """A fresh leaf per call, so that two forwards in flight never meet; its "gradient" is the sites' statistics."""
        meter = torch.zeros(len(self.slots), STATISTICS, device=device, requires_grad=True)
        monitor, slots = self.runtime.monitor, self.slots

        def fold(leaf: Tensor) -> None:
            if leaf.grad is not None:
                monitor.fold(slots, leaf.grad)
                leaf.grad = None

        meter.register_post_accumulate_grad_hook(fold)
        return meter
