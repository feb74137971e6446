"""The order of the passes. One direction, no going back; each arrow is one module in `fp8fx.passes`.

captured graph --annotate--> decisions --insert_qdq--> quantize nodes --cancel--> --fuse--> --lower--> runnable
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import fx

from fp8fx.capture.graph import Captured, copy_graph
from fp8fx.capture.sites import read_site
from fp8fx.errors import FP8Error, PassError, allowed, nearest
from fp8fx.passes.annotate import annotate
from fp8fx.passes.cancel import cancel
from fp8fx.passes.contract import Context, Pass, SiteDecision, Skip, decision
from fp8fx.passes.fuse import fuse
from fp8fx.passes.insert_qdq import insert_qdq
from fp8fx.passes.lower import lower

PASSES: tuple[tuple[str, Pass], ...] = (
    ("annotate", annotate),
    ("insert_qdq", insert_qdq),
    ("cancel", cancel),
    ("fuse", fuse),
    ("lower", lower),
)
STAGES = ("capture", *(name for name, _ in PASSES))


@dataclass(frozen=True)
class Annotated:
    """One site as annotate left it, for the plan: its decision, shapes as text, and FLOPs of its forward GEMM."""

    decision: SiteDecision
    shape: str
    flops: int


@dataclass
class Compiled:
    """The graph after `stage`, what each pass left alone, and the seconds each pass took."""

    module: fx.GraphModule
    stage: str
    skips: list[Skip] = field(default_factory=list)
    annotated: list[Annotated] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(captured: Captured, context: Context, stage: str = "lower") -> Compiled:
    """All passes up to and including `stage`, on a copy: the captured graph can be run through again."""
    check_stage(stage)
    result = Compiled(copy_graph(captured.module), stage)
    for name, function in PASSES[: STAGES.index(stage)]:
        start = time.perf_counter()
        try:
            made = function(result.module, context)
        except FP8Error:
            raise
        except Exception as error:
            raise PassError(
                f"pass {name} failed: {error}. This is a bug in fp8fx or in a pass of yours; the model is untouched."
            ) from error
        result.module = made.module
        result.skips += made.skips
        result.seconds[name] = time.perf_counter() - start
        if name == "annotate":
            result.annotated = _annotated(result.module)
    result.module.recompile()  # once: for a deep model it takes as long as a pass
    return result


def _annotated(module: fx.GraphModule) -> list[Annotated]:
    found = []
    for node in module.graph.nodes:
        made, call = decision(node), read_site(node)
        if made is not None:
            found.append(Annotated(made, call.shape if call is not None else "", call.flops if call is not None else 0))
    return found


def check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise PassError(f"no stage {stage!r}; there are {allowed(STAGES)}.{nearest(stage, STAGES)}")
