"""Sites of a model with a function in the place of each product: how search and quantization-aware training reach into the graph.

    y = linear(x, w, b)     ->     y = tap(x, w, b)        tap calls handler(site, x, w, product); product(x, w) is linear(x, w, b)

An addend (torch.addmm and its relatives) comes after what the handler gives where the recipe rounds the output: it rounds the product.

Capture, names and decisions are those of `fp8fx.compile`: functional sites are reached too, exempt ones are left alone, and what a
handler sees is named as a recipe's rules name it. The graph stays in high precision and runs eagerly, with autograd as usual.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fp8fx.autocast import FP8, mode
from fp8fx.capture.graph import Captured
from fp8fx.capture.layers import module_types
from fp8fx.capture.naming import weight_source
from fp8fx.capture.sites import CONVOLUTIONS, SiteCall, read_site
from fp8fx.clone import RUNTIME, check_materialized, check_model, clone, compiled_class
from fp8fx.graph_call import alive
from fp8fx.options import Options
from fp8fx.passes.contract import decision
from fp8fx.recipe import Recipe
from fp8fx.runtime import Runtime
from fp8fx.spec import SiteSpec, TensorSpec

Product = Callable[[Tensor, Tensor], Tensor]
Handler = Callable[["Site", Tensor, Tensor, Product], Tensor]


@dataclass(frozen=True)
class Operand:
    """One operand of a site, or its output: the role it has, its spec in the base recipe, and where its contraction lies.

    layout: `last` and `second_last` dimension; `tail`, all but the first (the weight of a convolution); `turned_tail`, all but
    the second (of a transposed one); `none` for what takes one scale per tensor only (the input of a convolution, its output).
    An output has its scales over its last dimension.
    """

    role: str
    spec: TensorSpec | None
    layout: str

    def rows(self, x: Tensor) -> Tensor:
        """`x` as a matrix whose rows are contracted: what a scale per row or block is meant for."""
        if self.layout in ("second_last", "turned_tail"):
            x = x.mT if self.layout == "second_last" else x.transpose(0, 1)
        return x.reshape(x.shape[0] if x.dim() else 1, -1) if self.layout in ("tail", "turned_tail", "none") else x.reshape(-1, x.shape[-1])

    def restore(self, rows: Tensor, x: Tensor) -> Tensor:
        """The matrix that `rows` gave, in the shape of `x` again."""
        if self.layout == "turned_tail":
            return rows.reshape(x.transpose(0, 1).shape).transpose(0, 1)
        return rows.reshape(x.mT.shape).mT if self.layout == "second_last" else rows.reshape(x.shape)


@dataclass(frozen=True)
class Site:
    """One product: its name, its operation, what annotate decided, its operands and its output; `left` is None for an embedding's index."""

    name: str
    op: str
    spec: SiteSpec
    left: Operand | None
    right: Operand
    output: Operand
    shape: str = ""

    @property
    def operands(self) -> tuple[Operand | None, Operand]:
        return self.left, self.right

    def roles(self) -> list[str]:
        """The roles that the base recipe quantizes here, of input, weight and output, each once."""
        return list(dict.fromkeys(o.role for o in (*self.operands, self.output) if o is not None and o.spec is not None))

    def having(self, role: str) -> list[Operand]:
        """What has this role: one or two operands, or the output."""
        return [o for o in (*self.operands, self.output) if o is not None and o.role == role]


def site_of(call: SiteCall, name: str, op: str, spec: SiteSpec) -> Site:
    weights = [weight_source(operand) is not None for operand in (call.x, call.w)]
    left, right = ("input", "weight"), ("last", "last")
    if call.op in ("matmul", "bmm", "grouped_mm"):
        left = ("weight" if weights[0] else "input", "weight" if weights[1] else "input")
        right = ("last", "second_last")
    elif call.op in CONVOLUTIONS:
        right = ("none", "turned_tail" if call.options["transposed"] else "tail")
    elif call.transposed_weight:
        right = ("last", "second_last")
    roles = [Operand(role, getattr(spec, role), layout) for role, layout in zip(left, right, strict=True)]
    output = Operand("output", spec.output, "none" if call.op in CONVOLUTIONS else "last")
    return Site(name, op, spec, None if call.op == "embedding" else roles[0], roles[1], output, call.shape)


class Tap(nn.Module):
    """Stands for one site in the graph; calls the runtime's `handle`. Under fp8fx.autocast(enabled=False) it is the product itself."""

    def __init__(
        self, runtime: TapRuntime, site: Site, target: Any, method: bool, places: tuple[int | str, int | str], adds: bool = False
    ) -> None:
        """adds: the call adds its first argument, and the handler is to see the product without it."""
        super().__init__()
        self.runtime: Any = weakref.ref(runtime)  # Dynamo's caches keep graphs for longer than anyone keeps the model
        self.site, self.method, self.places, self.adds = site, method, places, adds
        vars(self)["target"] = target  # not by assignment: a module would become a child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def product(x: Tensor, w: Tensor) -> Any:
            positional, named = list(args), dict(kwargs)
            for place, value in zip(self.places, (x, w), strict=True):
                if isinstance(place, int):
                    positional[place] = value
                else:
                    named[place] = value
            if self.method:
                return getattr(positional[0], vars(self)["target"])(*positional[1:], **named)
            return vars(self)["target"](*positional, **named)

        x, w = (args[place] if isinstance(place, int) else kwargs[place] for place in self.places)
        if mode() != FP8:
            return product(x, w)
        runtime: Any = alive(self.runtime)
        if not self.adds:
            return runtime.handle(self.site, x, w, product)
        y = runtime.handle(self.site, x, w, operator.matmul) * kwargs.get("alpha", 1)
        beta = kwargs.get("beta", 1)  # torch ignores the values of an addend with 0, NaN too
        return y if beta == 0 else y + beta * (args[0] if args else kwargs["input"])


class TapRuntime(Runtime):
    """A Runtime whose graphs have taps in the place of quantization; `handler` may be exchanged at any time."""

    def __init__(self, recipe: Recipe, handler: Handler | None = None) -> None:
        super().__init__(recipe, Options(plan_only=True))
        self.handler = handler
        self.sites: dict[str, Site] = {}  # in execution order

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"handler": None, "sites": {}}

    def handle(self, site: Site, x: Tensor, w: Tensor, product: Product) -> Tensor:
        return product(x, w) if self.handler is None else self.handler(site, x, w, product)

    def rewrite(
        self, captured: Captured, example_inputs: Sequence[Any], add_input: Callable[[fx.Graph, str], fx.Node]
    ) -> Callable[..., Any]:
        super().rewrite(captured, example_inputs, add_input)  # up to annotate
        module = self.graphs[-1].compiled.module
        return tap_graph(module, self)


def tap_graph(module: fx.GraphModule, runtime: TapRuntime) -> fx.GraphModule:
    """Put a Tap in the place of every site that the recipe quantizes. Fused attention has no product to tap and stays."""
    for number, node in enumerate(list(module.graph.nodes)):
        made, call = decision(node), read_site(node)
        if made is None or call is None or made.spec is None or made.mode != "fp8" or call.op == "attention":
            continue
        site = runtime.sites.setdefault(made.name, site_of(call, made.name, made.op, made.spec))
        method = node.op == "call_method"
        name = f"fp8fx_tap_{number}"
        adds = call.add is not None and site.spec.output is not None
        module.add_submodule(name, Tap(runtime, site, _in_place(node.target), method, _places(call), adds))
        with module.graph.inserting_before(node):
            tap = module.graph.call_module(name, node.args, node.kwargs)
        tap.meta = dict(node.meta)
        node.replace_all_uses_with(tap)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _in_place(target: Any) -> Any:
    """`x @= w` has no form in place for tensors."""
    return operator.matmul if target is operator.imatmul else target


_NAMES = (("input", "mat1", "batch1", "mat_a", "self"), ("weight", "other", "mat2", "batch2", "mat_b"))


def _places(call: SiteCall) -> tuple[int | str, int | str]:
    """Where the two operands stand among the call's arguments: an addend comes before them in addmm and its relatives."""
    first = 1 if call.add is not None or call.transposed_weight else 0
    found: list[int | str] = []
    for offset, names in enumerate(_NAMES):
        place = first + offset
        found.append(place if place < len(call.node.args) else next(name for name in names if name in call.node.kwargs))
    return found[0], found[1]


def tapped(model: nn.Module, runtime: TapRuntime) -> nn.Module:
    """A clone of `model` that runs under `runtime`; raises what fp8fx.compile raises for a model it cannot take."""
    check_materialized(check_model(model))
    runtime.recipe.check_names(module_types(model))
    fast = clone(model)
    vars(fast)[RUNTIME] = runtime
    fast.__class__ = compiled_class(type(model))
    runtime.attach(fast)
    runtime.original = model
    return fast
