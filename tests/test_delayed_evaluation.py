"""Delayed scaling: when the state moves and when it does not: in evaluation, of layers that are not reached, without an optimizer."""

from __future__ import annotations

import pytest
import torch
from delayed_net import EVERY_ROLE, batch, loss_of, net, scales, train
from oracle import sqnr
from torch import Tensor, nn

import fp8fx
from fp8fx import watch


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_reads_the_scales_and_changes_nothing(how: str) -> None:
    fast = fp8fx.compile(net(), EVERY_ROLE)
    train(fast, 3)
    before = {key: value.clone() for key, value in scales(fast).items()}
    outputs = []
    for seed in (1, 2, 1):
        if how == "eval":
            loss = loss_of(fast.eval(), batch(seed))
            loss.backward()
            outputs.append(loss.detach())
        else:
            with getattr(torch, how)():
                outputs.append(loss_of(fast, batch(seed)))
    assert torch.equal(outputs[0], outputs[2])
    after = scales(fast)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_goes_on_after_inference_mode_captured_it_first() -> None:
    fast = fp8fx.compile(net(), "delayed")
    with torch.inference_mode():
        fast(batch(0))
    train(fast, 2)
    assert any(value.item() != 1 for key, value in scales(fast).items() if key.endswith(".scale"))


def test_a_layer_that_is_not_reached_keeps_its_record() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            x = self.a(x)
            return self.b(x) if both else x

    torch.manual_seed(0)
    fast = fp8fx.compile(Optional(), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    x = torch.randn(4, 8)
    for both in (True, True, False, False):
        fast(x, both).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    fast(x, False)
    kept = scales(fast)
    assert torch.count_nonzero(kept["a.input.history"]) == 4
    assert torch.count_nonzero(kept["b.input.history"]) == 2
    assert kept["b.weight.scale"] != 1


class Auxiliary(nn.Module):
    """Another head in training, which reads the shared tensor first."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.main = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.aux(x) + self.main(x) if self.training else self.main(x)


def test_evaluation_that_reads_in_another_order_finds_its_scales() -> None:
    torch.manual_seed(0)
    model = Auxiliary()
    fast = fp8fx.compile(model, "delayed")
    x = torch.randn(64, 16) * 3000
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    for _ in range(3):
        fast(x).square().mean().mul(1e-8).backward()
        optimizer.step()
    fast(x)
    assert sqnr(model.eval()(x), fast.eval()(x)) > 20


def test_a_head_that_backward_does_not_reach_keeps_its_history() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    fast = fp8fx.compile(Heads(), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    for both in (True, True, False, False):
        a, b = fast(torch.randn(4, 8))
        (a.sum() + b.sum() if both else a.sum()).backward()
        optimizer.step()
    fast(torch.randn(4, 8))
    assert torch.count_nonzero(scales(fast)["a.grad_output.history"]) == 4
    assert torch.count_nonzero(scales(fast)["b.grad_output.history"]) == 2


def test_steps_that_no_optimizer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-written update is invisible: a warning says so, and fp8fx.step is the remedy."""
    monkeypatch.setattr(watch, "BACKWARDS", 3)
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")

    def update(count: int) -> None:
        for _ in range(count):
            fast(torch.ones(2, 8)).sum().backward()

    update(2)
    with pytest.warns(fp8fx.FP8Warning, match=r"fp8fx\.step\(model\)"):
        update(1)
    fp8fx.step(fast)
    fast(torch.ones(2, 8))
    assert all(value != 1 for key, value in scales(fast).items() if key.endswith("input.scale"))
    with pytest.raises(fp8fx.ModelError, match="not compiled by fp8fx"):
        fp8fx.step(nn.Linear(2, 2))


def test_evaluation_with_scales_that_were_never_set_warns_once() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    with pytest.warns(fp8fx.FP8Warning, match="never set: linear.input, linear.weight"):
        fast(torch.ones(2, 8))
    fast(torch.ones(2, 8))
    calibrated = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    with fp8fx.autocast(calibrating=True):
        calibrated(torch.ones(2, 8))
    calibrated(torch.ones(2, 8))


def test_training_in_eval_warns_once() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed").eval()
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    with pytest.warns(fp8fx.FP8Warning, match="never set"):
        fast(torch.ones(2, 8)).sum().backward()
    with pytest.warns(fp8fx.FP8Warning, match="trains in eval"):
        optimizer.step()
    fast(torch.ones(2, 8)).sum().backward()
    optimizer.step()
