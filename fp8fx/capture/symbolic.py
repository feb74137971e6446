"""The inspecting front end: torch.fx symbolic tracing, ahead of any call, of what it can trace.

It follows no data-dependent Python, so many models need Dynamo instead; what it traces comes out in the same form with the
same site names. Parameters and buffers are lifted to inputs, as Dynamo does.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8fx.capture.expand import expand_attention
from fp8fx.capture.graph import MODULE, TENSOR_NAME, VAL, Captured
from fp8fx.capture.naming import RootNames, assign_site_names
from fp8fx.errors import CaptureError

_LEAVES = (nn.RNNBase, nn.RNNCellBase)  # recurrent loops: no front end looks into them


class _Tracer(fx.Tracer):
    """Traces through every module, so that a linear is F.linear wherever it stands."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES)


def trace(root: nn.Module, forward: Callable[..., Any] | None = None, constants: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The symbolic trace of `root`. `constants`: arguments that are not tensors, by name. Raises CaptureError."""
    tracer = _Tracer()
    given = dict(constants or {})
    signature = inspect.signature(forward or root.forward)
    for name, parameter in signature.parameters.items():
        if parameter.default is None:
            given.setdefault(name, None)
    target = root if forward is None else _Borrowed(root, forward)
    try:
        graph = tracer.trace(target, concrete_args=given or None)
    except Exception as error:
        raise CaptureError(
            f"{type(root).__name__} cannot be traced symbolically: {error}\nSymbolic tracing follows no Python that depends on data "
            "or shapes. Capture with TorchDynamo instead: give example_inputs, or leave capture='dynamo'."
        ) from error
    return fx.GraphModule(tracer.root, graph)


class _Borrowed(nn.Module):
    """The root's modules under the original forward: a compiled model's own forward is not the one to trace."""

    def __init__(self, root: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update({key: value for key, value in vars(root).items() if key != "forward"})
        self.__dict__["forward"] = forward


def from_symbolic(module: fx.GraphModule, inputs: Sequence[Any], root: nn.Module) -> tuple[Captured, list[Tensor]]:
    """The common form of a symbolic trace, and the tensors lifted to inputs, in order.

    `inputs` are the values of the placeholders, in order; with none, shapes stay unknown and so do FLOPs.
    """
    names = RootNames(root)
    lifted = _lift(module, root)
    for node in module.graph.nodes:
        node.meta[MODULE] = _path(node)
        node.meta.setdefault(TENSOR_NAME, "")
    if inputs:
        _propagate(module, [*inputs, *lifted])
        expand_attention(module)
    assign_site_names(module.graph, names, Counter())
    module.graph.lint()
    module.recompile()
    return Captured(module, "symbolic", complete=True), lifted


def _lift(module: fx.GraphModule, root: nn.Module) -> list[Tensor]:
    """Turn get_attr nodes into inputs after the model's own."""
    lifted: dict[str, tuple[fx.Node, Tensor]] = {}
    for node in list(module.graph.find_nodes(op="get_attr")):
        target = str(node.target)
        if target not in lifted:
            last = module.graph.find_nodes(op="placeholder")
            place = module.graph.inserting_after(last[-1]) if last else module.graph.inserting_before(next(iter(module.graph.nodes)))
            with place:
                made = module.graph.placeholder(target.replace(".", "_"))
            value = _fetch(root, module, target)
            made.meta[TENSOR_NAME] = target if isinstance(value, nn.Parameter) or target in dict(root.named_buffers()) else ""
            lifted[target] = (made, value)
        node.replace_all_uses_with(lifted[target][0])
        module.graph.erase_node(node)
    return [value for _, value in lifted.values()]


def _fetch(root: nn.Module, module: fx.GraphModule, target: str) -> Tensor:
    owner: Any = root
    try:
        for part in target.split("."):
            owner = getattr(owner, part)
    except AttributeError:  # a constant the tracer made
        owner = getattr(module, target)
    return owner  # type: ignore[no-any-return]


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _propagate(module: fx.GraphModule, values: Sequence[Any]) -> None:
    """Fill meta["val"] by running the graph on fake tensors: shapes and dtypes, no arithmetic."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    class Propagator(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta[VAL] = result
            return result

    fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]
    try:
        with mode:
            Propagator(module).run(*fakes)
    except Exception as error:
        raise CaptureError(f"the symbolic graph does not run on these inputs: {error}") from error


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = graph.find_nodes(op="placeholder")
    place = graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes)))
    with place:
        return graph.placeholder(name)


class SymbolicForward:
    """A compiled forward made by symbolic tracing: one graph per signature, traced at its first call."""

    def __init__(self, runtime: Any, root: nn.Module, forward: Callable[..., Any]) -> None:
        self.runtime, self.root, self.forward = runtime, root, forward
        self.signature = inspect.signature(forward)
        self.graphs: dict[Any, tuple[Callable[..., Any], list[Tensor]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in bound.arguments.items() if name not in tensors}
        key = (self._describe(tensors), repr(constants), tuple(m.training for m in self.root.modules()), torch.is_grad_enabled())
        if key not in self.graphs:
            self.graphs[key] = self._capture(tensors, constants)
        call, lifted = self.graphs[key]
        return call(*tensors.values(), *lifted)

    @staticmethod
    def _describe(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple((name, tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in tensors.items())

    def _capture(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> tuple[Callable[..., Any], list[Tensor]]:
        module = trace(self.root, self.forward, constants)
        for node in list(module.graph.find_nodes(op="placeholder")):
            if str(node.target) not in tensors:  # a constant was traced into the graph
                module.graph.erase_node(node)
        captured, lifted = from_symbolic(module, list(tensors.values()), self.root)
        return self.runtime.rewrite(captured, [*tensors.values(), *lifted], append_placeholder), lifted
