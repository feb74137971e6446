"""One captured model under one recipe, to look at after every pass; and golden files of what that looks like.

FP8FX_UPDATE_GOLDEN=1 python -m pytest tests/passes      writes tests/passes/golden/*.txt again: read the diff before committing it
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fp8fx
from fp8fx import pipeline
from fp8fx.clone import runtime_of
from fp8fx.passes.contract import PassResult, Skip
from fp8fx.show import listing

GOLDEN = Path(__file__).parent / "golden"
UPDATE = bool(os.environ.get("FP8FX_UPDATE_GOLDEN"))
PASSES = dict(pipeline.PASSES)


def seeded(model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return model(*args, **kwargs)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Trace:
    """`model` compiled with `recipe` and called once. `graph(stage)` makes the graph after `stage` again, from the captured one."""

    def __init__(self, model: nn.Module, recipe: Any, *inputs: Any, **options: Any) -> None:
        self.model = model
        options.setdefault("dynamic", False)  # else a second shape in another test would make the sizes symbolic
        self.fast = fp8fx.compile(model, recipe, fullgraph=True, **options)
        self.inputs = inputs
        self.values: tuple[Any, ...] = ()  # of the captured graph's own inputs, at the latest call
        runtime = runtime_of(self.fast)
        runtime.backend = self._watched(runtime.backend)
        self.fast(*inputs)
        (self.record,) = runtime_of(self.fast).graphs
        self.plan = self.fast.plan()  # type: ignore[operator]

    def graph(self, stage: str) -> fx.GraphModule:
        return pipeline.run(self.record.captured, self.record.context, stage).module

    def apply(self, name: str, module: fx.GraphModule) -> PassResult:
        return PASSES[name](module, self.record.context)

    def _watched(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def watching(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
            call = backend(module, example_inputs)

            def run(*values: Any) -> Any:
                self.values = values
                return call(*values)

            return run

        return watching

    def result(self, name: str) -> PassResult:
        """What pass `name` does to the graph before it."""
        return self.apply(name, self.graph(pipeline.STAGES[pipeline.STAGES.index(name) - 1]))

    def skips(self, name: str) -> list[Skip]:
        return self.result(name).skips

    def ops(self, stage: str) -> Counter[str]:
        """How often each call occurs: fp8fx operators by name, functions and methods too."""
        nodes = [node for node in self.graph(stage).graph.nodes if node.op.startswith("call")]
        return Counter(operator_name(node) for node in nodes)

    def check_golden(self, name: str, stage: str) -> None:
        """The listings before and after pass `stage` are those of golden/`name`.txt."""
        before = pipeline.STAGES[pipeline.STAGES.index(stage) - 1]
        text = "".join(f"== {s}\n{listing(self.graph(s), full=True)}\n" for s in (before, stage))
        path = GOLDEN / f"{name}.txt"
        if UPDATE:
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; FP8FX_UPDATE_GOLDEN=1 writes it again"

    def assert_idempotent(self, name: str) -> None:
        """Run again on its own result, the pass modifies nothing, and the text says so too."""
        module = self.graph(name)
        before = listing(module, full=True)
        again = self.apply(name, module)
        assert not again.modified
        assert listing(again.module, full=True) == before


def operator_name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = str(getattr(node.target, "__name__", node.target))
    return str(node.target).removesuffix(".default") if str(node.target).startswith("fp8fx.") else name
