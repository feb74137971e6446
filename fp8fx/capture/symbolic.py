"""The inspecting front end: torch.fx symbolic tracing, ahead of any call, of what it can trace.

It follows no data-dependent Python, so many models need Dynamo instead; what it traces comes out in the same form with the
same site names. Parameters and buffers are lifted to inputs, as Dynamo does.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fp8fx.capture.expand import expand_attention
from fp8fx.capture.graph import MODULE, TENSOR_NAME, VAL, Captured
from fp8fx.capture.naming import RootNames, assign_site_names
from fp8fx.clone import base_class, runtime_of
from fp8fx.errors import CaptureError

_NORMS: tuple[Any, ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_LEAVES = (nn.RNNBase, nn.RNNCellBase)  # recurrent loops: no front end looks into them


class _Tracer(fx.Tracer):
    """Traces through every module, so that a linear is F.linear wherever it stands."""

    proxy_buffer_attributes = True  # a buffer that is written to (num_batches_tracked) is written to by the graph, not by the trace

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call_") and _modes() != self.modes:
            raise CaptureError(
                "its forward switches gradients or autocast (torch.no_grad, torch.enable_grad, torch.autocast), and a symbolic trace "
                "records neither."
            )
        return super().create_node(kind, *args, **kwargs)


def _modes() -> tuple[Any, ...]:
    """What surrounds a call and changes what it computes: gradients, inference mode, autocast of each device."""
    autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def trace(root: nn.Module, constants: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The symbolic trace of `root`. `constants`: arguments that are not tensors, by name; None: all that have a default.

    Raises CaptureError.
    """
    tracer = _Tracer()
    if constants is None:
        parameters = inspect.signature(root.forward).parameters.values()
        constants = {p.name: p.default for p in parameters if p.default is not p.empty}
    given = dict(constants)
    try:
        with _without_dimension_checks():
            graph = tracer.trace(_uncompiled(root), concrete_args=given or None)
    except Exception as error:
        why = "" if isinstance(error, CaptureError) else "Symbolic tracing follows no Python that depends on data or shapes. "
        raise CaptureError(
            f"{type(root).__name__} cannot be traced symbolically: {error}\n{why}Capture with TorchDynamo instead: give "
            "example_inputs, or leave capture='dynamo'."
        ) from error
    return fx.GraphModule(tracer.root, graph)


@contextlib.contextmanager
def _without_dimension_checks() -> Iterator[None]:
    """torch's batch and instance norms branch on `input.dim()`, only to refuse a wrong one: a proxy has no dim."""
    kept = [norm._check_input_dim for norm in _NORMS]
    for norm in _NORMS:
        setattr(norm, "_check_input_dim", lambda self, input: None)  # noqa: B010
    try:
        yield
    finally:
        for norm, check in zip(_NORMS, kept, strict=True):
            setattr(norm, "_check_input_dim", check)  # noqa: B010


def _uncompiled(root: nn.Module) -> nn.Module:
    """A compiled model as an object of its original class with the same contents: its own forward is not the one to trace."""
    if runtime_of(root) is None:
        return root
    base = base_class(root)
    made: nn.Module = base.__new__(base)
    vars(made).update(vars(root))
    return made


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
    return Captured(module, complete=True), lifted


def _lift(module: fx.GraphModule, root: nn.Module) -> list[Tensor]:
    """Turn get_attr nodes into inputs after the model's own."""
    for node in module.graph.find_nodes(op="placeholder"):
        node.args = ()  # no defaults: every input is given, and those lifted come after
    lifted: dict[str, tuple[fx.Node, Tensor]] = {}
    for node in list(module.graph.find_nodes(op="get_attr")):
        target = str(node.target)
        if target not in lifted:
            last = module.graph.find_nodes(op="placeholder")
            place = module.graph.inserting_after(last[-1]) if last else module.graph.inserting_before(next(iter(module.graph.nodes)))
            with place:
                made = module.graph.placeholder(target.replace(".", "_"))
            made.target = made.name  # a valid identifier, also where the name begins with a digit (nn.Sequential)
            value = made.meta[VAL] = _fetch(root, module, target)
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


def _erase_with_users(node: fx.Node) -> None:
    """A constant's input is read only by the checks that torch.fx writes for it (`_assert`, `eq`)."""
    for user in list(node.users):
        if not user._erased:
            _erase_with_users(user)
    node.graph.erase_node(node)


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
        own = dict([*self.root.named_parameters(), *self.root.named_buffers()])
        modes = (tuple(m.training for m in self.root.modules()), *_modes())
        key = (self._describe(tensors), repr(constants), modes, tuple(map(id, own.values())), self._describe(own))
        if key not in self.graphs:
            self.graphs[key] = self._capture(tensors, constants)
        call, lifted = self.graphs[key]
        return call(*tensors.values(), *lifted)

    @staticmethod
    def _describe(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple((name, tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in tensors.items())

    def _capture(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> tuple[Callable[..., Any], list[Tensor]]:
        for name, value in constants.items():
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                raise CaptureError(
                    f"{type(self.root).__name__} cannot be traced symbolically: argument {name!r} is a {type(value).__name__} that holds "
                    "tensors, and symbolic tracing takes tensors and constants. Capture with TorchDynamo instead: leave capture='dynamo'."
                )
        module = trace(self.root, constants)
        for node in list(module.graph.find_nodes(op="placeholder")):
            if str(node.target) not in tensors:  # a constant, traced into the graph
                _erase_with_users(node)
        captured, lifted = from_symbolic(module, list(tensors.values()), self.root)
        return self.runtime.rewrite(captured, [*tensors.values(), *lifted], append_placeholder), lifted
