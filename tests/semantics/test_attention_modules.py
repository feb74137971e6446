"""torch.nn's attention modules, whose fused inference path hides their layers: off under fp8fx.compile, named by the backend."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, Run, Tensors, check, data, enter, seeded
from torch import nn

import fp8fx


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def evaluates(run: Run) -> Tensors:
    y = run(run.tensor(data(2, 5, 16)))
    run.loss(y).backward()
    run.model.eval()
    with torch.no_grad():
        evaluated = run(run.tensor(data(2, 5, 16))).clone()
    assert torch.equal(evaluated, y) or run.dtype is torch.float64
    kept = {name: g for name, g in run.gradients().items() if name != "self_attn.in_proj_bias"}  # of its middle third, nothing but noise
    return {"y": y.detach(), "eval": evaluated, **kept}


@pytest.mark.parametrize("entry", ENTRIES)
def test_train_and_eval_round_alike(entry: str) -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert enabled
    torch.backends.mha.set_fastpath_enabled(entry == "compile")  # of the backend's user it is asked; fp8fx.compile needs no help
    try:
        called = check(encoder_layer, evaluates, "hybrid", entry)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert [row.name for row in fp8fx.plan(called).fp8] == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]


def test_the_backend_says_what_it_cannot_reach() -> None:
    called = enter(seeded(encoder_layer).eval(), entry="backend")
    with torch.no_grad(), pytest.warns(fp8fx.FP8Warning, match=r"fused inference kernel.*set_fastpath_enabled\(False\)"):
        called(data(2, 5, 16))
    rows = [row for row in fp8fx.plan(called).rows if row.decision == "high_precision"]
    assert len(rows) == 1
    assert "set_fastpath_enabled(False)" in rows[0].reason


def test_the_switch_is_off_for_all_threads_and_put_back() -> None:
    """One model returns while another still runs: the switch stays off until the last is done."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2)

        @torch._dynamo.disable
        def wait(self) -> None:
            entered.set()
            assert leave.wait(60)
            seen.append(torch.backends.mha.get_fastpath_enabled())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            self.wait()
            return self.fc(x)

    slow, quick = enter(seeded(Waits)), enter(seeded(encoder_layer))
    thread = threading.Thread(target=lambda: slow(data(2, 16)))
    thread.start()
    assert entered.wait(60)
    quick(data(2, 5, 16))
    leave.set()
    thread.join()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_switch_is_left_alone_where_no_layer_is_hidden() -> None:
    seen: list[bool] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        @torch._dynamo.disable
        def look(self) -> None:
            seen.append(torch.backends.mha.get_fastpath_enabled())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.look()
            return self.fc(x)

    enter(seeded(Looks))(data(2, 16))
    assert seen == [True]


@pytest.mark.parametrize("listed", [True, False])
def test_an_attention_module_that_comes_later(listed: bool) -> None:
    """Or that `model.modules()` does not name. The call that captures it runs it as torch does, fused; the next knows."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.more: Any = nn.ModuleList() if listed else []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            for module in self.more:
                x = module(x)
            return x

    fast = enter(seeded(Grows)).eval()
    with torch.no_grad():
        fast(data(2, 5, 16))
        fast.more.append(encoder_layer().eval())
        for _ in range(3):
            fast(data(2, 5, 16))
    rows, layers = fp8fx.plan(fast).rows, ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    names = [row.name for row in rows if row.decision == "fp8"]
    assert set(names) == {"fc", *(f"more.0.{name}" for name in layers)} if listed else len(names) == 5
    assert not [row for row in rows if "fused inference" in row.reason]
