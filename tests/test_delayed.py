"""Delayed scaling: the state beside an independent oracle, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from delayed_net import EVERY_ROLE, RECIPES, assert_equal_state, batch, by_backend, by_compile, loss_of, net, scales, train
from delayed_oracle import DelayedOracle
from gate.stages import QUANTIZED_STAGES, run_stages
from oracle import sqnr
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.clone import runtime_of


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("entry", [by_compile, by_backend])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_the_oracles(recipe: str, entry: Any, inner: str) -> None:
    """Five steps of two microbatches: outputs, gradients, and the scales that follow."""
    model = net()
    fast, runtime = entry(model, RECIPES[recipe], inner)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(fast, batch(0)).backward()  # captured; what it measured belongs to the first step
    oracle = DelayedOracle(copy.deepcopy(model), RECIPES[recipe], runtime().plan(), dtype=None)
    loss_of(oracle, batch(0)).backward()
    for step in range(5):
        for micro in range(2):
            index = batch(10 * step + micro + 1)
            ours, theirs = fast(index), oracle(index)
            assert sqnr(theirs, ours) > 80
            F.cross_entropy(ours.flatten(0, 1), index.flatten()).backward()
            F.cross_entropy(theirs.flatten(0, 1), index.flatten()).backward()
        for (name, mine), other in zip(model.named_parameters(), oracle.model.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert sqnr(other.grad, mine.grad) > 40, name
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # the same weights: a code that flips must not grow into another run
            for mine, other in zip(model.parameters(), oracle.model.parameters(), strict=True):
                other.copy_(mine)
                other.grad = None
        oracle.end_step()
        fast(batch(0))  # the step begins
        oracle(batch(0))
        state = runtime().scaling
        for slot, row in state.slots.items():
            record = oracle.records[slot.site.removesuffix(".embedding"), slot.role]
            assert state.scale[row].item() == pytest.approx(record.scale, rel=1e-6), slot
            kept = state.history[row].tolist()
            assert kept[: len(record.history)] == pytest.approx(record.history, rel=1e-4), slot
            assert not any(kept[len(record.history) :])
    assert len(state.slots) >= 13


def test_the_plan_says_what_has_no_parameter() -> None:
    fast = fp8fx.compile(net(), "delayed")
    fast(batch(0))
    rows = {row.name: row for row in fast.plan().rows}  # type: ignore[operator]
    assert rows["block.matmul"].spec.input.scaling == "current"
    assert "no parameter, so current scaling" in rows["block.matmul"].reason
    assert rows["block.q"].spec.input.scaling == "delayed"
    assert not any("matmul" in key for key in scales(fast))


def test_one_record_serves_a_shared_input() -> None:
    fast = fp8fx.compile(net(), "delayed")
    fast(batch(0))
    held = {key.removesuffix(".scale") for key in scales(fast) if key.endswith(".scale")}
    assert {"block.q.input", "block.q.weight", "block.k.weight", "block.v.weight"} <= held
    train(fast, 2)
    kept = scales(fast)
    for other in ("block.k.input", "block.v.input"):  # it is theirs too: each may be the first reader of another graph
        assert torch.equal(kept[f"{other}.history"], kept["block.q.input.history"])
        assert torch.equal(kept[f"{other}.scale"], kept["block.q.input.scale"])


def test_microbatches_share_a_scale_and_merge_by_max() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.0)
    x = torch.ones(2, 8)
    for factor in (1.0, 5.0, 3.0):
        fast(factor * x).sum().backward()
        assert next(value for key, value in scales(fast).items() if key.endswith("input.scale")).item() == 1
    optimizer.step()
    fast(x)
    kept = next(value for key, value in scales(fast).items() if key.endswith("input.history"))
    assert kept.tolist() == [5.0, *[0.0] * 15]


def test_an_overflowed_step_does_not_spoil_the_scale() -> None:
    torch.manual_seed(0)
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.0)
    for value in (1.0, float("inf"), float("nan"), 0.0):
        fast(torch.full((2, 8), value)).sum().backward()
        optimizer.step()
    fast(torch.ones(2, 8))
    kept = scales(fast)
    assert all(torch.isfinite(value).all() and (value > 0).all() for key, value in kept.items() if key.endswith(".scale"))


def test_gradients_that_are_not_measured_warn() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    parameters = list(fast.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(fast(torch.ones(2, 8)).sum(), parameters), strict=True):
        parameter.grad = grad
    with pytest.warns(fp8fx.FP8Warning, match=r"torch\.autograd\.grad"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        fast = fp8fx.compile(nn.Linear(8, 8), "delayed")
        fast(torch.ones(2, 8)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype == torch.float32 for value in scales(fast).values())


def test_the_plan_notes_gradients_that_may_overflow() -> None:
    fast = fp8fx.compile(nn.Linear(8, 8), {"extends": "hybrid", "defaults": {"grad_output": {"scaling": "delayed"}}})
    fast(torch.ones(2, 8))
    assert "write overflow: saturate" in str(fast.plan())  # type: ignore[operator]


def test_two_forwards_in_flight() -> None:
    """Each backward uses the scales its own forward was given, and merges into the step it is in."""
    one, two = fp8fx.compile(net(), EVERY_ROLE), fp8fx.compile(net(), EVERY_ROLE)
    for fast in (one, two):
        train(fast, 2)
    first, second = loss_of(one, batch(7)), loss_of(one, batch(8))
    first.backward()
    second.backward()
    for seed in (7, 8):
        loss_of(two, batch(seed)).backward()
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]
    assert_equal_state(one, two)


@pytest.mark.parametrize("recipe", ["delayed", "every_role"])
def test_same_bits_and_same_amax_after_every_pass(recipe: str) -> None:
    amax: dict[str, Tensor] = {}
    fasts: list[Any] = []
    compile_ = fp8fx.compile
    model = net().train()

    def watched(*args: Any, **kwargs: Any) -> Any:
        fasts.append(compile_(*args, **kwargs))
        return fasts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8fx, "compile", watched)
        results = run_stages(model, RECIPES[recipe], (batch(0),), on_stage=lambda stage: amax.update({stage: _taken(fasts[0])}))
    for stage in QUANTIZED_STAGES[1:]:
        assert torch.equal(amax[stage], amax[QUANTIZED_STAGES[0]]), stage
        for ours, theirs in zip(results[stage][0], results[QUANTIZED_STAGES[0]][0], strict=True):
            assert torch.equal(ours, theirs), stage
        for name, grad in results[stage][1].items():
            assert torch.equal(grad, results[QUANTIZED_STAGES[0]][1][name]), (stage, name)
    assert (amax["lower"] >= 0).all()


def _taken(fast: Any) -> Tensor:
    """This step's amax, which is then forgotten."""
    state = runtime_of(fast).scaling
    taken: Tensor = state.amax.clone()
    state.amax.fill_(-1)
    return taken


def test_kept_weights_follow_the_scales() -> None:
    """Evaluation between an optimizer step and the next forward keeps weights under the old scales: they must not outlive them."""
    kept, fresh = (fp8fx.compile(net(), {"extends": "delayed", "defaults": {"weight_cache": c}}) for c in ("step", "none"))
    for fast in (kept, fresh):
        optimizer = train(fast, 2)
        loss_of(fast, batch(1)).backward()
        optimizer.step()
        with torch.no_grad():
            fast(batch(2))
        loss_of(fast, batch(3))
    assert torch.equal(kept(batch(4)), fresh(batch(4)))


def test_a_tied_weight_has_one_scale_and_its_two_gradients_have_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.embed(index))

    torch.manual_seed(0)
    fast = fp8fx.compile(Tied(), "delayed")
    train(fast, 2)
    loss_of(fast, batch(1)).backward()
    records = {key.removesuffix(".scale") for key in scales(fast) if key.endswith(".scale")}
    assert {key for key in records if key.endswith("weight")} == {"embed.embedding.weight", "head.weight"}
    gradients = {key: scales(fast)[f"{key}.amax"].item() for key in records if key.endswith("grad_output")}
    assert len(gradients) == len(set(gradients.values())) == 2


def test_dynamic_sizes_share_the_records() -> None:
    fast = fp8fx.compile(net(), "delayed", dynamic=True)
    count = None
    for size in (2, 3, 5):
        loss_of(fast, batch(size, size)).backward()
        count = count or len(scales(fast))
        assert len(scales(fast)) == count
    assert len(runtime_of(fast).graphs) == 1
