"""The recipes rowwise and blockwise against the oracle: the same codes and scales, the same accuracy forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, compare_gradients, margin, plain, sqnr, worst_margin
from oracle_axes import BLOCKWISE, ROWWISE, AxisRole
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx import numerics
from fp8fx.spec import TensorSpec

RECIPES = ["rowwise", "blockwise"]
TOLERANCE = 0.5  # dB
WIDTH = 160  # one whole block of 128 and one that is cut


class Net(nn.Module):
    """A table, linears that share an input, products of activations, and a gated MLP; no size is a multiple of a block's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 48, bias=bias) for bias in (True, False, True))
        self.proj = nn.Linear(48, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 300), nn.Linear(WIDTH, 300), nn.Linear(300, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 40)

    def forward(self, index: Tensor) -> Tensor:
        x = self.norm(self.embed(index))
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.proj(torch.softmax(q @ k.mT / 7, -1) @ v)
        return self.lm_head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 40, (3, 45), generator=torch.Generator().manual_seed(seed))


def pictures(seed: int) -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, Any] = {"attention": (Net, tokens), "convolutions": (Convolutions, pictures)}


def make(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    cls, data = MODELS[name]
    return cls(), data(seed)


def loss(y: Tensor) -> Tensor:
    """Its gradient differs from element to element, by four orders of magnitude from row to row."""
    weights = torch.logspace(-2, 2, y.shape[-2], dtype=y.dtype).unsqueeze(-1)
    return (y.square() * weights).mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_output_and_gradients_are_as_accurate_as_the_oracles(recipe: str, name: str) -> None:
    fast = fp8fx.compile(make(name, 0)[0], recipe)
    for seed in range(5):
        model, x = make(name, seed)
        fast.load_state_dict(model.state_dict())
        fast.zero_grad()
        reference, y = plain(model), fast(x)
        plan = fast.plan()  # type: ignore[operator]
        oracle = Oracle(plain(model, torch.float32), recipe, plan, dtype=None)
        wanted, rounded = reference(x if name == "attention" else x.double()), oracle(x)
        for out in (y, wanted, rounded):
            loss(out).backward()  # type: ignore[no-untyped-call]
        assert margin(sqnr(wanted, y), sqnr(wanted, rounded)) >= -TOLERANCE
        found = compare_gradients(reference, oracle, fast)
        assert worst_margin(found) >= -TOLERANCE
        # Powers of two scale without rounding: what is left is the order of sums, unless it moves a value across a rounding boundary.
        assert sqnr(rounded, y) > 30
        assert sum(g.agreement > 80 for g in found) >= len(found) / 2
        assert 15 < sqnr(wanted, y) < 60
        assert plan.fp8_flops_share == 1.0


def test_the_oracles_differ() -> None:
    """One recipe held against the other's oracle fails the bars above."""
    model, x = make("attention", 0)
    y = fp8fx.compile(model, "rowwise")(x)
    assert sqnr(Oracle(plain(model, torch.float32), "rowwise", dtype=None)(x), y) > 60
    for other in ("blockwise", "hybrid"):
        assert sqnr(Oracle(plain(model, torch.float32), other, dtype=None)(x), y) < 40


# -- codes and scales -----------------------------------------------------------------------------------------------------


def role_of(spec: TensorSpec, dims: tuple[int, ...]) -> tuple[AxisRole, int]:
    """The oracle's role, and the axis that the GEMM contracts: a block lies along it."""
    saturate = spec.overflow == "saturate"
    if spec.granularity == "row":
        (axis,) = dims
        return AxisRole("row", saturate), axis
    assert not isinstance(spec.granularity, str)
    rows, columns = spec.granularity
    return (AxisRole((rows, columns), saturate), -1) if columns >= rows else (AxisRole((columns, rows), saturate), -2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_code_and_scale_of_a_training_step_is_the_oracles(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, TensorSpec, tuple[int, ...], Tensor, Tensor]] = []
    real = numerics.quantize_tensor

    def record(x: Tensor, spec: TensorSpec, dims: tuple[int, ...] = (-1,), **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, amax = real(x, spec, dims, **options)
        seen.append((x.detach().clone(), spec, dims, q.clone(), scale.clone()))
        return q, scale, amax

    model, x = make("attention", 0)
    fast = fp8fx.compile(model, recipe)
    fast(x)
    monkeypatch.setattr(numerics, "quantize_tensor", record)
    loss(fast(x)).backward()  # type: ignore[no-untyped-call]
    kinds = {(spec.granularity, spec.overflow) for _, spec, *_ in seen}
    whole: Any = ROWWISE if recipe == "rowwise" else BLOCKWISE
    for role in (whole.input, whole.weight, whole.grad_output):
        overflow = "saturate" if role.saturate else "nonfinite"
        both = {role.blocks, role.blocks if isinstance(role.blocks, str) else role.blocks[::-1]}
        assert both <= {granularity for granularity, how in kinds if how == overflow}
    for value, spec, dims, q, scale in seen:
        role, axis = role_of(spec, dims)
        codes, scales = role.codes(value, axis)
        assert np.array_equal(scale.numpy(), scales)
        assert np.array_equal(q.view(torch.uint8).numpy(), codes.view(np.uint8))


# Subnormal codes, an empty row, rows that differ by 2^40, a NaN, infs, and a block that ends early.
HARD = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 130).unsqueeze(1)
HARD[3], HARD[5, 7], HARD[6, 150], HARD[129, 199] = 0.0, float("nan"), float("inf"), -float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
@pytest.mark.parametrize("blocks", ["row", (1, 128), (128, 128)])
def test_codes_and_scales_of_hard_values(blocks: Any, overflow: str, axis: int, dtype: torch.dtype) -> None:
    x = HARD.to(dtype)
    lying = blocks if isinstance(blocks, str) or axis == -1 else blocks[::-1]
    spec = TensorSpec(format="e4m3fn", granularity=lying, overflow=overflow, power_of_two=True)
    q, scale, _ = numerics.quantize_tensor(x, spec, (axis,))
    codes, scales = AxisRole(blocks, overflow == "saturate").codes(x, axis)
    assert np.array_equal(scale.numpy(), scales)
    nan = x.isnan() | (x.isinf() if overflow == "nonfinite" else False)
    kept = ~nan.numpy()
    assert np.array_equal(q.view(torch.uint8).numpy()[kept], codes.view(np.uint8)[kept])
    assert q.float()[nan].isnan().all()
    assert np.isnan(codes[~kept].astype(np.float32)).all()


# -- what the plan says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_convolutions_have_one_scale_per_tensor_and_the_plan_says_why(recipe: str) -> None:
    model, x = make("convolutions", 0)
    row = fp8fx.plan(model, recipe, example_inputs=x)["conv"]
    assert (row.decision, row.formats) == ("fp8", "e4m3fn x e4m3fn, grad e5m2")
    assert row.reason.endswith("a convolution has one scale per tensor")
    assert {s.granularity for s in (row.spec.input, row.spec.weight, row.spec.grad_output)} == {"tensor"}
    first = fp8fx.plan(model, {"extends": recipe, "boundary": {"first": "exempt"}}, example_inputs=x)["conv"]
    assert first.decision == "exempt"  # the rule for convolutions does not switch it back on


def test_the_plan_shows_granularities() -> None:
    found = {name: fp8fx.plan(Net(), name, example_inputs=tokens(0))["q"].formats for name in RECIPES}
    assert found["rowwise"] == "e4m3fn/row x e4m3fn/row, grad e4m3fn/row"
    assert found["blockwise"] == "e4m3fn/1x128 x e4m3fn/128x128, grad e4m3fn/1x128"


def test_embeddings() -> None:
    plans = {name: fp8fx.plan(Net(), name, example_inputs=tokens(0)) for name in RECIPES}
    assert plans["rowwise"]["embed"].decision == "fp8"
    assert (plans["blockwise"]["embed"].decision, plans["blockwise"]["embed"].reason) == (
        "high_precision",
        "an embedding has no block scales",
    )
    assert {plan["lm_head"].decision for plan in plans.values()} == {"exempt"}
