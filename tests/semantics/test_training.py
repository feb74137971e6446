"""What a training loop does around a model: accumulation, clipping, freezing, modes, inputs that need gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data
from semantics.models import Attention, Mlp, Modal
from torch import Tensor

import fp8fx

everywhere = pytest.mark.parametrize("entry", ENTRIES)
in_all_ways = pytest.mark.parametrize(("recipe", "entry"), WAYS)


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor | None]:
    return {f"{prefix} {name}": value for name, value in tensors.items()}


# -- several backwards, one step ------------------------------------------------------------------------------------------


def accumulates(run: Run) -> Tensors:
    """Two steps of three micro-batches each. Rounding is per micro-batch: the gradients are summed in high precision."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1 / run.scale)
    found: dict[str, Tensor | None] = {}
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(3):
            y = run(run.tensor(data(4, 16, seed=10 * step + micro)))
            (run.loss(y) / 3).backward()
            found[f"y {step} {micro}"] = y.detach()
        found |= prefixed(f"step {step}", run.gradients())
        optimizer.step()
    return found | {name: p.detach().clone() for name, p in run.model.named_parameters()}


@in_all_ways
def test_gradient_accumulation(recipe: str, entry: str) -> None:
    check(Mlp, accumulates, recipe, entry)


def two_backwards(run: Run) -> Tensors:
    """retain_graph: the second backward reads what the first has read, and adds the same again."""
    total = run.loss(run(run.tensor(data(4, 16))))
    total.backward(retain_graph=True)
    once = run.gradients()
    total.backward()
    return prefixed("once", once) | prefixed("twice", run.gradients())


@everywhere
def test_backward_twice(entry: str) -> None:
    check(Mlp, two_backwards, "hybrid", entry)


def clips(run: Run) -> Tensors:
    run.loss(run(run.tensor(data(4, 16)))).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05 * run.scale)
    by_norm = prefixed("norm", run.gradients())
    torch.nn.utils.clip_grad_value_(run.model.parameters(), 0.004 * run.scale)
    return {"norm": norm} | by_norm | prefixed("value", run.gradients())


@in_all_ways
def test_gradient_clipping(recipe: str, entry: str) -> None:
    check(Mlp, clips, recipe, entry)


# -- what needs a gradient ------------------------------------------------------------------------------------------------


def freezes(run: Run) -> Tensors:
    """Frozen from the start; one more later; all but the head; then everything trains again."""
    found: dict[str, Tensor | None] = {}
    run.model.inp.weight.requires_grad_(False)
    run.model.up.bias.requires_grad_(False)
    stages: list[Callable[[], object]] = [
        lambda: None,
        lambda: run.model.down.requires_grad_(False),
        lambda: [p.requires_grad_(name.startswith("head")) for name, p in run.model.named_parameters()],
        lambda: run.model.requires_grad_(True),
    ]
    for number, change in enumerate(stages):
        change()
        run.model.zero_grad(set_to_none=True)
        run.loss(run(run.tensor(data(4, 16)))).backward()
        found |= prefixed(str(number), run.gradients())
    assert found["0 inp.weight"] is None
    assert found["2 up.weight"] is None
    assert None not in [found[f"3 {name}"] for name, _ in run.model.named_parameters()]
    return found


@in_all_ways
def test_frozen_weights(recipe: str, entry: str) -> None:
    check(Mlp, freezes, recipe, entry)


def input_gradient(run: Run) -> Tensors:
    """Of an input that needs one, with and without parameters that do; then of an input that needs none."""
    found: dict[str, Tensor | None] = {}
    for trains in (True, False):
        run.model.requires_grad_(trains)
        run.model.zero_grad(set_to_none=True)
        x = run.tensor(data(2, 5, 16).requires_grad_())
        run.loss(run(x)).backward()
        found |= prefixed(str(trains), {"x": x.grad, **run.gradients()})
    run.model.requires_grad_(True)
    x = run.tensor(data(2, 5, 16))
    run.loss(run(x)).backward()
    assert x.grad is None
    return found | run.gradients()


@in_all_ways
def test_inputs_with_and_without_gradient(recipe: str, entry: str) -> None:
    check(Attention, input_gradient, recipe, entry)


def by_autograd_grad(run: Run) -> Tensors:
    x = run.tensor(data(4, 16).requires_grad_())
    wanted = {"x": x, "up": run.model.up.weight, "head": run.model.head.weight}
    grads = torch.autograd.grad(run.loss(run(x)), list(wanted.values()))
    assert all(value is None for value in run.gradients().values())
    return dict(zip(wanted, grads, strict=True))


@everywhere
def test_autograd_grad_writes_no_grad(entry: str) -> None:
    check(Mlp, by_autograd_grad, "hybrid", entry)


# -- modes ----------------------------------------------------------------------------------------------------------------


def switches_modes(run: Run) -> Tensors:
    """Train, evaluate, train again: running statistics move in training only, and evaluation reads them."""
    found: dict[str, Tensor | None] = {}
    for number, training in enumerate((True, False, True, False)):
        run.model.train(training)
        run.model.zero_grad()
        y = run(run.tensor(data(6, 16, seed=number)))
        run.loss(y).backward()
        found |= prefixed(str(number), {"y": y.detach(), **run.gradients()})
        found |= prefixed(str(number), {name: b.clone() for name, b in run.model.named_buffers()})
    assert not torch.equal(found["0 norm.running_mean"], found["2 norm.running_mean"])  # type: ignore[arg-type]
    assert torch.equal(found["0 norm.running_mean"], found["1 norm.running_mean"])  # type: ignore[arg-type]
    return found


@in_all_ways
def test_train_and_eval(recipe: str, entry: str) -> None:
    check(lambda: Modal(0.0), switches_modes, recipe, entry)


def drops(run: Run) -> Tensors:
    run.model.train()
    torch.manual_seed(7)
    y = run(run.tensor(data(6, 16)))
    run.loss(y).backward()
    run.model.eval()
    return {"train": y.detach(), **run.gradients(), "eval": run(run.tensor(data(6, 16))).detach()}


@everywhere
def test_dropout_draws_what_the_plain_model_draws(entry: str) -> None:
    called = check(Modal, drops, "hybrid", entry)
    called.train()
    assert not torch.equal(called(data(6, 16)), called(data(6, 16)))


def without_gradients(run: Run) -> Tensors:
    """no_grad and inference_mode around the call, training before, between and after."""
    found: dict[str, Tensor | None] = {}
    for number, context in enumerate((torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad)):
        run.model.zero_grad()
        with context():
            y = run(run.tensor(data(4, 16)))
            assert y.requires_grad == (context is torch.enable_grad)
            assert y.is_inference() == (context is torch.inference_mode)
            found[f"{number} y"] = y.detach().clone()
            if y.requires_grad:
                run.loss(y).backward()
        found |= prefixed(str(number), run.gradients())
        with torch.no_grad():  # the kept quantized weights must notice
            for p in run.model.parameters():
                p.mul_(1.03125)
    return found


@in_all_ways
def test_no_grad_and_inference_mode(recipe: str, entry: str) -> None:
    check(Mlp, without_gradients, recipe, entry)


class Inside(Mlp):
    """Half of its forward runs without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.inp(x)
        return self.head(x + self.feed(self.norm(x)))


def one_step(run: Run) -> Tensors:
    y = run(run.tensor(data(4, 16)))
    run.loss(y).backward()
    return {"y": y.detach(), **run.gradients()}


@in_all_ways
def test_no_grad_inside_the_model(recipe: str, entry: str) -> None:
    called = check(Inside, one_step, recipe, entry)
    assert len(fp8fx.plan(called).fp8) == 4
