"""How often TorchDynamo compiles a model, and where it breaks: fp8fx must cost no graph that the plain model does not cost."""

from __future__ import annotations

from typing import Any

import torch
from models.case import Case
from torch import nn
from torch._dynamo.utils import counters


class Graphs:
    """Context manager: how many graphs Dynamo compiled inside it, and how many `breaks` it met."""

    compiled = breaks = 0

    def __enter__(self) -> Graphs:
        self._before = self._now()
        return self

    def __exit__(self, *problem: Any) -> None:
        compiled, breaks = self._now()
        self.compiled, self.breaks = compiled - self._before[0], breaks - self._before[1]

    @staticmethod
    def _now() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def exercise(case: Case, model: nn.Module) -> None:
    """What a training script does with a model: steps of an optimizer, an evaluation without gradients between them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for evaluated in (True, False):
        model.train()
        optimizer.zero_grad()
        case.loss(case.logits(model)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if evaluated:
            model.eval()
            with torch.no_grad():
                case.logits(model)
    model.train()


def check_graphs(case: Case, fast: nn.Module, so_far: Graphs) -> None:
    """`fast` costs the graphs that torch.compile of the plain model costs, without a break, and none when all is done again.

    `so_far`: what Dynamo did for the training forwards of `fast` until now.
    """
    with Graphs() as ours:
        exercise(case, fast)
    with torch.compiler.set_stance("fail_on_recompile"), Graphs() as again:
        exercise(case, fast)
    torch._dynamo.reset()
    with Graphs() as plain:
        exercise(case, torch.compile(case.model, backend="eager"))  # type: ignore[arg-type]
    assert plain.compiled > 0
    assert plain.breaks == 0
    assert so_far.breaks + ours.breaks == 0
    assert so_far.compiled + ours.compiled <= plain.compiled
    assert again.compiled == 0
