"""Outputs that a recipe rounds learn their grids too: what is exported, what the pipeline then runs, and the gradients through a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from qat.test_relaxed import relaxed
from rounded_net import Net
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx import formats
from fp8fx.ops import observe

OUTPUTS = {"extends": "hybrid", "defaults": {"output": {"format": "e4m3fn", "scaling": "current"}}}


def made(recipe: Any = OUTPUTS, **kwargs: Any) -> tuple[Net, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 8, 8)
    return model, fp8fx.qat(model, recipe, data=x, **kwargs), x


def train(trained: Any, x: Tensor, steps: int = 4) -> list[float]:
    learned = fp8fx.quantizer_parameters(trained)
    own = {id(p) for p in learned}
    weights = [p for p in trained.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": learned, "weight_decay": 0.0}], lr=1e-2)
    labels, losses = torch.arange(len(x)) % 5, []
    for _ in range(steps):
        loss = F.cross_entropy(trained(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def seen(fast: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor, str]]:
    """By site what the pipeline rounds as its output, the values it gives, and their format."""
    found: dict[str, tuple[Tensor, Tensor, str]] = {}

    def look(site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: Any) -> None:
        if role == "output":
            found[site] = (x.detach(), fp8fx.dequantize(q, scale, spec.format, granularity=spec.granularity), spec.format)

    observe.OBSERVERS.append(look)
    try:
        with torch.no_grad():
            fast(x)
    finally:
        observe.OBSERVERS.remove(look)
    return found


RECIPES: dict[str, Any] = {
    "outputs": OUTPUTS,
    "direct": "direct",
    "emulation-direct": "emulation-direct",
    "a dict": {"input": "int8", "weight": "e4m3fn", "output": "e3m4fn"},
    "rows": {
        "extends": "hybrid",
        "defaults": {"output": "none"},
        "rules": [{"match": "head", "output": {"format": "int8", "granularity": "row"}}],
    },
}


@pytest.mark.parametrize(("name", "learn"), [(n, ("max_value", "mantissa_bits")) for n in RECIPES] + [("outputs", ("max_value",))])
def test_the_learned_recipe_rounds_the_same_outputs(name: str, learn: tuple[str, ...]) -> None:
    model, trained, x = made(RECIPES[name], learn=learn, exempt=["matmul*"] if name == "rows" else [])
    learning = [site for site, role, _ in trained._fp8fx_qat.items() if role == "output"]
    assert learning == (["head"] if name == "rows" else ["conv", "up", "matmul", "matmul_1", "head"])
    before = {site: trained._fp8fx_qat.get(site, "output").max_value.item() for site in learning}
    losses = train(trained, x)
    assert losses[-1] < losses[0]
    assert all(trained._fp8fx_qat.get(site, "output").max_value.item() != value for site, value in before.items())
    trained.eval()
    recipe = trained.recipe()
    fast = fp8fx.compile(model, recipe).eval()
    with torch.no_grad():
        ours, theirs = trained(x), fast(x)
    assert (ours - theirs).norm() < 2e-2 * ours.norm(), "an output next to a midpoint may go the other way, no more"
    found = seen(fast, x)
    assert set(found) == set(learning)
    for site, (y, values, format) in found.items():
        quantizer = trained._fp8fx_qat.get(site, "output")
        assert format == quantizer.learned_format
        rows = y.reshape(-1, y.shape[-1])
        assert torch.equal(quantizer(rows).detach(), values.reshape(rows.shape)), site
    role = fp8fx.plan(model, recipe, example_inputs=x)["head"].spec.output
    assert (role.scaling, role.overflow, role.rounding) == ("current" if name == "rows" else "fixed", "saturate", "nearest_even")


def test_an_output_that_a_reader_takes_in_high_precision_learns_nothing() -> None:
    """As in the pipeline: annotate leaves such outputs alone, in training and in the exported recipe."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 8)
    trained: Any = fp8fx.qat(model, "direct", data=x)
    assert [(site, role) for site, role, _ in trained._fp8fx_qat.items()] == [
        ("0", "input"), ("0", "weight"), ("2", "input"), ("2", "weight"), ("2", "output"),
    ]  # fmt: skip


class Added(nn.Module):
    """A function and a method that add, with factors; a bias in a function is a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(torch.full_like(x, 0.3), x, self.w, beta=0.5, alpha=3.0)
        z = x[None].baddbmm(y[None], (self.w * 1)[None], beta=0, alpha=2)[0]
        return torch.addmm(self.b, z, self.v)


def test_an_addend_comes_after_the_rounding() -> None:
    """In a grid of four bits, where it would show."""
    torch.manual_seed(0)
    model, x = Added(), torch.randn(4, 6)
    trained: Any = fp8fx.qat(model, {"input": "int8", "weight": "int8", "output": "int4"}, data=x).eval()
    assert [role for _, role, _ in trained._fp8fx_qat.items()].count("output") == 3
    with torch.no_grad():
        assert torch.allclose(trained(x), fp8fx.compile(model, trained.recipe()).eval()(x), atol=1e-4)
        assert not torch.allclose(trained(x), model(x), atol=1e-1)
    with torch.no_grad(), fp8fx.autocast(enabled=False):
        assert torch.equal(trained(x), model(x))


@pytest.mark.parametrize("name", ["e4m3none", "e2m5none", "int8"])
def test_gradients_through_a_layer_are_those_of_the_relaxed_function(name: str) -> None:
    """Only the output is rounded. Finite differences in float64 by the largest value, the mantissa bits, the weight, the bias and x."""
    format, h = formats.get(name), 1e-6
    learns_bits = not format.integer
    torch.manual_seed(0)
    model, x = nn.Linear(12, 40), torch.randn(50, 12)
    recipe = {"extends": "hybrid", "defaults": {"input": "none", "weight": "none", "output": {"format": name}}}
    learn = ("max_value", "mantissa_bits") if learns_bits else ("max_value",)
    trained: Any = fp8fx.qat(model, recipe, data=x, learn=learn)
    (quantizer,) = (q for _, _, q in trained._fp8fx_qat.items())
    with torch.no_grad():
        quantizer.log2_max.fill_(0.0)  # clips a part
    leaf, weight = x.clone().requires_grad_(), torch.randn(50, 40)
    (trained(leaf) * weight).sum().backward()

    x64, w64, b64 = x.double(), model.weight.detach().double(), model.bias.detach().double()
    top0, bits0 = float(quantizer.max_value.detach().double()), float(format.mantissa_bits)
    y0 = F.linear(x, model.weight, model.bias).detach().double()  # what was rounded: float32
    assert bool(((y0.abs() / top0 - 1).abs() > 1e-4).all()), "an output at the edge has no derivative"
    assert 0.02 < float((y0.abs() > top0).double().mean()) < 0.5

    def loss(x: Tensor = x64, w: Tensor = w64, b: Tensor = b64, log2_top: float = 0.0, bits: float = bits0) -> float:
        tops = torch.tensor(2.0, dtype=torch.float64) ** log2_top
        y = relaxed(F.linear(x, w, b), y0, tops, top0, torch.tensor(bits, dtype=torch.float64), format)
        return float((y * weight).sum())

    def slope(up: float, down: float) -> float:
        return (up - down) / (2 * h)

    assert float(quantizer.log2_max.grad) == pytest.approx(slope(loss(log2_top=h), loss(log2_top=-h)), rel=1e-3, abs=1e-3)
    if learns_bits:
        numeric = slope(loss(bits=bits0 + h), loss(bits=bits0 - h))
        assert float(quantizer.mantissa_bits.grad) == pytest.approx(numeric, rel=1e-3, abs=1e-3)
    leaves = {"x": (x64, leaf.grad), "w": (w64, model.weight.grad), "b": (b64, model.bias.grad)}
    for key, (value, gradient) in leaves.items():
        assert gradient is not None
        for place in ((0,) * value.dim(), tuple(n - 1 for n in value.shape)):
            step = torch.zeros_like(value)
            step[place] = h
            numeric = slope(loss(**{key: value + step}), loss(**{key: value - step}))
            assert float(gradient[place]) == pytest.approx(numeric, rel=1e-3, abs=1e-3), key


def test_a_learned_output_that_diverged_names_the_layer() -> None:
    _, trained, x = made()
    with torch.no_grad():
        trained._fp8fx_qat.get("head", "output").log2_max.fill_(math.nan)
    assert bool(trained(x).isnan().all())
    with pytest.raises(fp8fx.ModelError, match="layer 'head': what is learned for its output is no longer finite"):
        trained.recipe()


def test_scales_in_powers_of_two_of_an_output_are_refused() -> None:
    recipe = {"extends": "hybrid", "defaults": {"output": {"format": "mxfp8_e4m3"}}}
    with pytest.raises(fp8fx.ModelError, match="layer 'linear' output: scale_format: e8m0"):
        fp8fx.qat(nn.Linear(32, 32), recipe, data=torch.randn(4, 32))
