"""The inner compiler: what runs a rewritten graph. Eager runs it as it is; AOTAutograd and Inductor compile it first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.eval_frame import innermost_fn
from torch._ops import OpOverload

from fp8fx.arithmetic.product import prepare
from fp8fx.capture import dynamo
from fp8fx.ops.available import triton_works
from fp8fx.ops.inductor import decompositions
from fp8fx.ops.kept import static_records
from fp8fx.options import Options, in_cuda_graphs
from fp8fx.passes.device import GRAD_RECORDS, RECORDS
from fp8fx.spec import ACCUMULATORS, SiteSpec, TensorSpec


def compiled_inner(module: fx.GraphModule, example_inputs: list[Any], options: Options) -> Callable[..., Any]:
    """`module` by the compiler that `options` name; `auto` is Inductor where an input is on a GPU, else eager."""
    cuda = any(isinstance(x, Tensor) and x.is_cuda for x in example_inputs)
    name = options.inner
    if name == "auto":
        name = "inductor" if cuda and triton_works() else "eager"
    if name == "eager":
        return module.forward  # not the module, whose call runs torch's global module hooks once more
    with dynamo.own_cache_key():
        if name == "inductor":
            made = _by_inductor(module, example_inputs, options.inner_mode, cuda)
        else:
            made = torch._dynamo.lookup_backend(name)(module, example_inputs)
    # Dynamo calls a backend's graph with itself switched off; so does what AOTAutograd returns, once more, and at a cost.
    return innermost_fn(made) if options.capture == "dynamo" else made


def _by_inductor(module: fx.GraphModule, example_inputs: list[Any], mode: str | None, cuda: bool) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches = torch._inductor.list_mode_options(mode) if mode else {}
    further: dict[str, Any] = {"decompositions": decompositions()} if cuda else {}
    if in_cuda_graphs(mode):
        _keep_in_place(module)
        _make_constants(module, example_inputs)
        further["inner_compile"] = static_records(compile_fx_inner)
    return compile_fx(module, example_inputs, config_patches=patches or None, **further)  # type: ignore[return-value]


def _keep_in_place(module: fx.GraphModule) -> None:
    """Say that the records never move: kernels measure into the runtime's own memory.

    CUDA graphs copy every other input to an address of its own, at each call, but parameters and buffers, which Dynamo has marked itself.
    """
    for node in module.graph.find_nodes(op="placeholder"):
        if node.meta.get("extra") in (RECORDS, GRAD_RECORDS):
            node.meta["tensor_dict"] = {**(node.meta.get("tensor_dict") or {}), "_dynamo_static_input_type": "unguarded"}


def _make_constants(module: fx.GraphModule, example_inputs: list[Any]) -> None:
    """What operators make once and keep: a CUDA graph's memory must not hold it."""
    devices = {x.device for x in example_inputs if isinstance(x, Tensor) and x.is_cuda}
    for device in devices:
        for text, formats in _arithmetics(module).items():
            prepare(text, formats, device)
    if devices and triton_works():
        from fp8fx.ops import cuda

        for device in devices:
            cuda.one(device)


def _arithmetics(module: fx.GraphModule) -> dict[str, set[str]]:
    """The arithmetics of the sites' products, with the formats of their operands ("": high precision)."""
    found: dict[str, set[str]] = {}
    for node in module.graph.nodes:
        if not isinstance(node.target, OpOverload) or node.target.namespace != "fp8fx":
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        sites = [SiteSpec.parse_backward(value) for name, value in given.items() if name.startswith("backward") and value]
        specs = [TensorSpec.parse(value) for name, value in given.items() if name.endswith("spec") and value]
        specs += [spec for site in sites for spec in (site.grad_output,) if spec is not None]
        for text in {text for site in sites for text in site.accumulate} - {*ACCUMULATORS}:
            found.setdefault(text, {""}).update(spec.format for spec in specs)
    return found
