"""Run every stage of a compiled model's first graph on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fp8fx
from fp8fx import pipeline
from fp8fx.capture.dynamo import compile_with
from fp8fx.clone import base_class, runtime_of
from fp8fx.graph_call import GraphCall

QUANTIZED_STAGES = ("insert_qdq", "cancel", "fuse", "lower")


def run_stages(
    model: nn.Module, recipe: Any, args: tuple[Any, ...], on_stage: Callable[[str], None] | None = None, **options: Any
) -> dict[str, tuple[list[Tensor], dict[str, Tensor]]]:
    """stage -> (outputs, gradients by parameter name), each from the same parameters, inputs and random stream.

    on_stage: called after each stage's backward.
    """
    fast = fp8fx.compile(model, recipe, **options)
    runtime = runtime_of(fast)
    seen: list[tuple[Any, ...]] = []

    def spy(module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        call = runtime.backend(module, example_inputs)

        def run(*inputs: Any) -> Any:
            seen.append(inputs)
            return call(*inputs)

        return run

    compile_with(base_class(fast).forward.__get__(fast), spy, fullgraph=True)(*args)
    record, inputs = runtime.graphs[0], seen[0]
    results = {}
    for stage in QUANTIZED_STAGES:
        module = pipeline.run(record.captured, record.context, stage).module
        call = GraphCall(runtime, module)
        runtime.stream.call = 0
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        outputs = [out for out in call(*inputs) if isinstance(out, Tensor)]
        sum(out.float().square().sum() for out in outputs).backward()  # type: ignore[union-attr]
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if on_stage is not None:
            on_stage(stage)
        results[stage] = ([out.detach() for out in outputs], grads)
    model.zero_grad(set_to_none=True)
    return results


def assert_same_bits(results: dict[str, tuple[list[Tensor], dict[str, Tensor]]]) -> None:
    reference_outputs, reference_grads = results[QUANTIZED_STAGES[0]]
    for stage, (outputs, grads) in results.items():
        for ours, theirs in zip(outputs, reference_outputs, strict=True):
            assert torch.equal(ours, theirs), f"outputs change at {stage}"
        assert grads.keys() == reference_grads.keys()
        for name in grads:
            assert torch.equal(grads[name], reference_grads[name]), f"gradient of {name} changes at {stage}"
