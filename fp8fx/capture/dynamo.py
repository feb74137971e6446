"""The robust front end: TorchDynamo's graph, copied and brought into the common form.

Everything that touches Dynamo's private side is in this file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import LocalSource

from fp8fx.capture.expand import expand_attention
from fp8fx.capture.graph import MODULE, TENSOR_NAME, VAL, Captured, copy_graph
from fp8fx.capture.naming import Numbering, RootNames, assign_site_names, join, split_source
from fp8fx.capture.regions import inline_regions
from fp8fx.clone import base_class
from fp8fx.errors import CaptureError, FP8Error
from fp8fx.kernels import layout

# The names of a forward's code: torch's own, and the wrappers that torch and `compile_with` put around one of torch.nn's.
_FORWARDS = ("forward", "_call_impl", "_wrapped_call_impl", "inner", "run")


def _owner_key(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]) -> tuple[str, ...]:
    """Whose frame it is: the parameters it reads; buffers only where it reads none, since training reads more of a batch norm's."""
    named = [(n.meta[TENSOR_NAME], value) for n, value in zip(placeholders, example_inputs, strict=False) if n.meta[TENSOR_NAME]]
    return tuple(name for name, value in named if isinstance(value, nn.Parameter)) or tuple(name for name, _ in named)


def from_dynamo(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    root: nn.Module,
    numbering: Numbering | None = None,
    frame: object = None,
    base: str = "",
) -> Captured:
    """The captured form of a graph that Dynamo hands to a backend. `module` is left as it is.

    numbering: of the functional sites over all graphs of `root`; `frame` (frame_key()) says which frame this graph is of,
    and `base` (own_base()) what that calls its module; both are known only while Dynamo compiles it.
    """
    numbering = numbering or Numbering()
    copied = copy_graph(module)
    inline_regions(copied)
    names = RootNames(root)
    placeholders = copied.graph.find_nodes(op="placeholder")
    prefixes = _prefixes(placeholders, example_inputs, names)
    for node, value in zip(placeholders, example_inputs, strict=False):
        found = names.of_tensor(value)
        local, suffix = split_source(_source(node))
        wanted = join(prefixes.get(local, ""), suffix)
        node.meta[TENSOR_NAME] = wanted if wanted in found else (found[0] if found else "")
    own = prefixes.get(base or own_base(), "")
    for node in copied.graph.nodes:
        node.meta[VAL] = node.meta.get("example_value")
        node.meta[MODULE] = _module_path(node, prefixes, own)
    _readable_names(copied.graph)
    expand_attention(copied)
    counts = numbering.start((frame, _owner_key(placeholders, example_inputs)))
    assign_site_names(copied.graph, names, counts)
    numbering.finish(counts)
    copied.recompile()
    reason = getattr(module, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    of_root = set(prefixes.values()) <= {""}
    resumed, forward = _forward_frame(frame, root)
    starts, ends = of_root and forward and not resumed, of_root and forward and not broken
    return Captured(copied, complete=not broken and of_root, starts=starts, ends=ends)


def _forward_frame(frame: object, root: nn.Module) -> tuple[bool, bool]:
    """(does it go on after a graph break, is it one of the root's forward and not of another method) of a frame_key()."""
    if not isinstance(frame, tuple):
        return False, True
    resumed = re.fullmatch(r"torch_dynamo_resume_in_(.*)_at_\d+", frame[2])
    code = getattr(base_class(root).forward, "__code__", None)
    return resumed is not None, (resumed.group(1) if resumed else frame[2]) in {*_FORWARDS, getattr(code, "co_name", "forward")}


def _readable_names(graph: fx.Graph) -> None:
    """Inputs by the names a user knows: `fc1_weight` instead of `l_self_modules_fc1_parameters_weight_`."""
    for node in graph.find_nodes(op="placeholder"):
        base, suffix = split_source(_source(node))
        if not suffix or suffix[0].isdigit():  # an argument, or an item of `*args`
            suffix = join(_local_name(base), suffix)
        name = re.sub(r"\W+", "_", node.meta.get(TENSOR_NAME) or suffix or node.name)
        node._rename(name)
        node.target = node.name


def _local_name(source: str) -> str:
    found = re.fullmatch(r"[LG]\['([^']*)'\]", source)
    return found.group(1) if found else ""


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)  # a method up to torch 2.9, a property since


def _prefixes(placeholders: Sequence[fx.Node], values: Sequence[Any], names: RootNames) -> dict[str, str]:
    """Frame base (`L['self']`) -> path in the root. By parameter identity; a frame without parameters by the object itself."""
    pairs: dict[str, list[tuple[str, list[str]]]] = {}
    for node, value in zip(placeholders, values, strict=False):
        base, suffix = split_source(_source(node))
        if found := names.of_tensor(value):
            pairs.setdefault(base, []).append((suffix, found))
    prefixes = {base: prefix for base, entries in pairs.items() if (prefix := names.prefix(entries)) is not None}
    for name, value in _frame_locals().items():
        path = names.of_module(value)
        if path is not None:
            prefixes.setdefault(f"L['{name}']", path)
    return prefixes


def _tracer() -> Any:
    """Dynamo's tracer of the frame it is compiling: its output graph is up the stack while it calls the backend."""
    frame = sys._getframe(1)
    while frame is not None:
        tracer = getattr(frame.f_locals.get("self"), "root_tx", None)
        if tracer is not None and isinstance(getattr(tracer, "f_locals", None), dict):
            return tracer
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _frame_locals() -> dict[str, Any]:
    tracer = _tracer()
    return {} if tracer is None else tracer.f_locals


def captured_module() -> nn.Module | None:
    """The module whose method Dynamo is compiling: the first module among the frame's locals, `self` first."""
    found = _frame_locals()
    values = [found.get("self"), *found.values()]
    return next((value for value in values if isinstance(value, nn.Module)), None)


def compiled_module() -> nn.Module | None:
    """The module that the user gave to torch.compile, whose call is under way: what is captured may be a block deep inside it.

    Of compiled modules inside each other it is the innermost; where no module was given, the one whose method is captured, if any.
    """
    captured, frame = captured_module(), sys._getframe(1)
    while frame is not None:
        value = frame.f_locals.get("self")
        if isinstance(value, torch._dynamo.OptimizedModule):
            value = value._orig_mod
        elif getattr(value, "_compiled_call_impl", None) is None:  # set by module.compile()
            value = None
        if isinstance(value, nn.Module) and (captured is None or any(module is captured for module in value.modules())):
            return value
        frame = frame.f_back  # type: ignore[assignment]
    return captured


def frame_key() -> tuple[str, int, str] | None:
    """Which frame is being compiled: file, line and name of its code. What follows a graph break is a frame of its own."""
    code = getattr(_tracer(), "f_code", None)
    return None if code is None else (code.co_filename, code.co_firstlineno, code.co_name)


def own_base() -> str:
    """The base of the module whose method is compiled, whatever its first argument is called."""
    found = _frame_locals()
    name = "self" if isinstance(found.get("self"), nn.Module) else next((n for n, v in found.items() if isinstance(v, nn.Module)), "self")
    return f"L['{name}']"


def guard_module() -> bool:
    """Let what is being compiled serve the module it is compiled for, and no other instance of its class. False if it has none.

    Dynamo guards on a module's type and parameters' shapes only, so that a second model of a class would run the graph of the first.
    """
    context, base = torch._guards.TracingContext.try_get(), own_base()
    name = base[len("L['") : -len("']")]
    if context is None or not isinstance(_frame_locals().get(name), nn.Module):
        return False
    context.guards_context.dynamo_guards.add(LocalSource(name).make_guard(GuardBuilder.ID_MATCH))
    return True


def guard_hooks() -> None:
    """Let what is being compiled notice hooks that a module without hooks gets later: Dynamo leaves that guard out by default."""
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT:
            guards.add(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))


def _module_path(node: fx.Node, prefixes: dict[str, str], own: str) -> str:
    """The dotted path of the innermost module that made a node; `own` is that of the frame's own module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return own
    path = next(reversed(stack.values()))[0]
    base, suffix = split_source(path)
    return join(prefixes.get(base, ""), suffix)


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A further input after the existing ones. AOTAutograd wants to know where an input comes from, so it gets a source."""
    last = _last_placeholder(graph)
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    node._dynamo_source = LocalSource(f"fp8fx_{name}")  # type: ignore[attr-defined]
    return node


def _last_placeholder(graph: fx.Graph) -> fx.Node | None:
    """Unsorted, torch lists nodes as they were made, which is their order here: sorting thousands for each weight is slow."""
    found = graph.find_nodes(op="placeholder", sort=False)
    if found and found[-1].next.op == "placeholder":
        found = graph.find_nodes(op="placeholder")
    return found[-1] if found else None


def static(values: list[Tensor]) -> list[Tensor]:
    """Inputs whose sizes never change, as the inner compiler should see them: AOTAutograd would otherwise take sizes for symbolic, and
    compare them, by name, with those of other models."""
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    for value in values:
        torch._dynamo.mark_static(value)
    return values if mode is None else [mode.from_tensor(value, static_shapes=True) for value in values]


@functools.cache
def _formulas() -> str:
    """A digest of the sources of operators and of the layout of what they return. torch caches a compiled backward under the forward's
    graph, which holds the operators' names alone."""
    folder = Path(__file__).parents[1]
    sources = [folder / "spec.py", Path(layout.__file__), *sorted((folder / "ops").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def own_cache_key() -> contextlib.AbstractContextManager[Any]:
    """While entered, what torch compiles is cached for these formulas only: another version of fp8fx must not run its backward."""
    if not hasattr(torch.compiler.config, "cache_key_tag"):
        return contextlib.nullcontext()
    tag = f"{torch.compiler.config.cache_key_tag}fp8fx-{_formulas()}"
    patched: contextlib.AbstractContextManager[Any] = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    return patched


class Later:
    """Lets the inner compiler compile a captured graph again after Dynamo is done with it.

    Sizes that are symbolic in the graph stay so: its inputs are given as Dynamo's fake tensors, in Dynamo's own mode for them. Compiled
    from real tensors, it would hold for their sizes only, and no guard would say so.
    """

    def __init__(self, graph: fx.Graph) -> None:
        context = torch._guards.TracingContext.try_get()
        self._mode = None if context is None else context.fake_mode
        self._values = [node.meta[VAL] for node in graph.find_nodes(op="placeholder")]
        self._stack = contextlib.ExitStack()

    def inputs(self, values: Sequence[Any]) -> list[Any]:
        """`values`, or what stands for them in the graph."""
        return list(values) if self._mode is None else self._values

    def __enter__(self) -> Later:
        if self._mode is not None:
            self._stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(self._mode)))
        return self

    def __exit__(self, *problem: Any) -> None:
        self._stack.close()


def explain(error: Exception, fullgraph: bool = False) -> FP8Error | None:
    """What fp8fx should say about an exception that left a compiled forward; None if it is the model's own.

    An FP8Error raised inside the backend comes out of Dynamo wrapped; it is taken out again.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FP8Error):
            return seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    if not isinstance(error, TorchDynamoException):
        return None
    first = str(error).strip().split("\n\n")[0].strip()
    own = re.search(r"got (\w+)\((['\"])(.*)\2\)", first)  # what an operation of the model itself raised, on shapes alone
    if own is not None:
        return CaptureError(f"the model's forward fails on these inputs: {own.group(1)}: {own.group(3)}\nThe model passed in is untouched.")
    where = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s+(.*)', str(error).partition("from user code:")[2])
    first += "\n  At {}:{}: {}".format(*where[-1]) if where else ""
    less = "; without fullgraph=True the rest of it may still be captured" if fullgraph else ""
    return CaptureError(
        f"TorchDynamo could not capture the model: {first}\nThe model passed in is untouched. "
        f"With on_capture_error='eager' it runs in high precision instead{less}."
    )


def compile_with(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile`, each call with its own cache entries: models of one class never count against one limit."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # frames inside the model, from torch 2.13 on
        options["isolate_recompiles"] = True
    return torch.compile(_with_own_code(function), backend=backend, **options)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache entries hang on the code object, at most 256 of them, so each model gets a copy of its forward's.

    The entries go with the copy when the model does.
    """
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, types.FunctionType):
        return function
    if inner.__code__.co_filename.startswith(str(Path(torch.__file__).parent)):  # Dynamo would wrap torch.nn's in one of its own

        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return _with_own_code(run)
    copied = types.FunctionType(inner.__code__.replace(), inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copied.__kwdefaults__ = inner.__kwdefaults__
    copied.__dict__.update(inner.__dict__)
    return copied.__get__(function.__self__) if isinstance(function, types.MethodType) else copied
