"""Copies and conversions: deepcopy, copy, pickle, state dicts of another recipe, to(dtype), the meta device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from semantics.harness import ENTRIES, WAYS, Run, Tensors, check, data, enter, seeded
from semantics.models import Mlp
from torch import Tensor, nn

import fp8fx


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def trains(run: Run, steps: int = 2, seed: int = 0) -> dict[str, Tensor | None]:
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05 / run.scale)
    found: dict[str, Tensor | None] = {}
    for number in range(steps):
        optimizer.zero_grad()
        y = run(run.tensor(data(4, 16, seed=seed + number)))
        run.loss(y).backward()
        optimizer.step()
        found |= {f"{number} y": y.detach(), **{f"{number} {name}": g for name, g in run.gradients().items()}}
    return found


@pytest.mark.parametrize(
    ("by", "entry", "called"),
    [(copy.deepcopy, "compile", False), (copy.deepcopy, "compile", True), (by_pickle, "compile", True), (copy.deepcopy, "backend", True)],
)
def test_a_copy_trains_alone(by: Callable[[Any], Any], entry: str, called: bool) -> None:
    """The copy trains, then the first, then a copy of the copy: each from its own weights, as the plain models do."""

    def body(run: Run) -> Tensors:
        if called:
            trains(run, 1)
        copied = run.copied(by)
        of_copy = trains(copied, seed=10)
        of_first = trains(run, seed=20)
        of_second = trains(copied.copied(by), seed=30)
        found = {"copy": of_copy, "first": of_first, "second": of_second}
        return {f"{who} {name}": value for who, values in found.items() for name, value in values.items()}

    check(Mlp, body, "hybrid", entry)


def test_a_copy_shares_nothing_a_shallow_copy_the_tensors() -> None:
    fast = enter(seeded(Mlp))
    fast(data(4, 16))
    deep, shallow = copy.deepcopy(fast), copy.copy(fast)
    assert not {id(p) for p in deep.parameters()} & {id(p) for p in fast.parameters()}
    assert [id(p) for p in shallow.parameters()] == [id(p) for p in fast.parameters()]
    for copied in (deep, shallow):
        assert torch.equal(copied(data(4, 16)), fast(data(4, 16)))
        assert len(fp8fx.plan(copied).fp8) == 4


# -- dtype ----------------------------------------------------------------------------------------------------------------


def step(run: Run) -> dict[str, Tensor | None]:
    run.model.zero_grad()
    x = run.tensor(data(4, 16).requires_grad_())
    y = run(x)
    run.loss(y).backward()
    return {"y": y.detach(), "x": x.grad, **run.gradients()}


@pytest.mark.parametrize(
    ("recipe", "entry", "dtype"), [*((*way, torch.bfloat16) for way in WAYS), ("hybrid", "compile", torch.float16)], ids=str
)
def test_models_in_half_precision(recipe: str, entry: str, dtype: torch.dtype) -> None:
    """Sums of 16-bit gradients round in another order than the oracle's: the bar is that of bfloat16 and float16, not of FP8."""
    check(Mlp, step, recipe, entry, dtype=dtype, agreement=40.0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_to_another_dtype_after_the_first_call(entry: str) -> None:
    def body(run: Run) -> Tensors:
        first = step(run)
        if run.dtype is not torch.float64:
            run.model.to(torch.bfloat16)
            run.dtype = torch.bfloat16
        second = step(run)
        assert run.dtype is torch.float64 or all(g.dtype is torch.bfloat16 for g in second.values())  # type: ignore[union-attr]
        return {f"{n} {name}": value for n, values in enumerate((first, second)) for name, value in values.items()}

    check(Mlp, body, "hybrid", entry, agreement=40.0)


def test_to_a_dtype_converts_the_shared_parameters_of_both() -> None:
    """As in torch, `to` writes into the Parameters, which the clone and the original share."""
    model = seeded(Mlp)
    fast = enter(model)
    assert fast.to(torch.bfloat16) is fast
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]


# -- the meta device ------------------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    model = seeded(Mlp)
    model.up.to("meta")
    return model.to("meta")


MESSAGE = r"parameter 'inp.weight' lies on the meta device.*to_empty"


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(fp8fx.ModelError, match=MESSAGE):
        fp8fx.compile(on_meta())
    called = enter(on_meta(), entry="backend")
    with pytest.raises(Exception, match="(?s)ModelError.*" + MESSAGE):
        called(torch.empty(4, 16, device="meta"))
    buffers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False, device="meta"))
    with pytest.raises(fp8fx.ModelError, match=r"several devices|buffer '1.running_mean' lies on the meta device"):
        fp8fx.compile(buffers)


def test_a_model_moved_to_meta_after_compiling_is_refused_and_comes_back() -> None:
    model = seeded(Mlp)
    fast = enter(model)
    before = fast(data(4, 16))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    fast.to("meta")
    with pytest.raises(fp8fx.ModelError, match=MESSAGE):
        fast(torch.empty(4, 16, device="meta"))
    fast.to_empty(device="cpu")
    fast.load_state_dict(values)
    assert torch.equal(fast(data(4, 16)), before)


def test_a_plan_needs_no_values() -> None:
    """What a recipe would do to a model too large to be made here."""
    plan = fp8fx.plan(on_meta(), "hybrid", example_inputs=torch.empty(4, 16, device="meta"))
    assert [(row.name, row.decision, row.flops) for row in plan.rows] == [
        (row.name, row.decision, row.flops) for row in fp8fx.plan(seeded(Mlp), "hybrid", example_inputs=data(4, 16)).rows
    ]


def test_to_empty_and_load_then_compile() -> None:
    model, source = on_meta(), seeded(Mlp, seed=3)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(enter(model)(data(4, 16)), enter(source)(data(4, 16)))


# -- state dicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", ["hybrid", "direct", "rowwise", "none"])
@pytest.mark.parametrize("ours", ["hybrid", "direct"])
@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs")
def test_a_state_dict_of_another_recipe_loads(ours: str, theirs: str) -> None:
    """It holds the weights and the position in the random stream, which every recipe has: nothing of it can be misread."""
    source = fp8fx.compile(seeded(Mlp, seed=1), theirs)
    source(data(4, 16))
    fast = fp8fx.compile(seeded(Mlp), ours)
    fast(data(4, 16))
    result = fast.load_state_dict(source.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    wanted = fp8fx.compile(seeded(Mlp, seed=1), ours)
    assert torch.equal(fast(data(4, 16)), wanted(data(4, 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_fp8fx.stream": torch.zeros(2, dtype=torch.int64)}, r"_fp8fx\.stream.*int64 \[2\], expected int64 \[3\]"),
        ({"_fp8fx.stream": torch.zeros(3)}, r"_fp8fx\.stream.*float32.*int64 \[3\]"),
        ({"_fp8fx.strem": torch.zeros(3, dtype=torch.int64)}, r"_fp8fx\.strem.*Did you mean '_fp8fx.stream'\?"),
    ],
)
def test_state_that_fp8fx_did_not_write_is_named(change: dict[str, Tensor], message: str) -> None:
    fast = fp8fx.compile(seeded(Mlp), "direct")
    state = {**fast.state_dict(), **change}
    with pytest.raises(fp8fx.ModelError, match=message):
        fast.load_state_dict(state)
