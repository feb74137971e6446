"""Figures against independent ones, what a study leaves alone, suggestions, and the forms a result is written in."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.sensitivity import Sensitivity


class Net(nn.Module):
    """q and k share their input; a product of two activations; batch norm, whose buffers a study must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.drop, self.out = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm((self.q(x) @ self.k(x).mT).softmax(-1) @ x)))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, 16, generator=generator), torch.randint(0, 5, (4, 8), generator=generator)) for _ in range(count)]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def result(net: Net) -> Sensitivity:
    net.q.weight.grad = torch.ones_like(net.q.weight)
    state = torch.get_rng_state()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = fp8fx.sensitivity(net, iter(batches()), "hybrid")
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net.q.weight.grad, torch.ones_like(net.q.weight))
    assert net.k.weight.grad is None
    return found


def on_grid(x: Tensor) -> Tensor:
    """Nearest E4M3 under one scale, by ml_dtypes."""
    scale = np.float32(x.abs().max().item()) / np.float32(448)
    return torch.from_numpy((x.detach().numpy() * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)


def sqnr(pairs: list[tuple[Tensor, Tensor]]) -> float:
    signal, noise = sum(x.double().square().sum() for x, _ in pairs), sum((x - y).double().square().sum() for x, y in pairs)
    return 10 * math.log10(float(signal) / float(noise))


def test_figures_are_those_of_an_independent_rounding(net: Net, result: Sensitivity) -> None:
    assert [layer.name for layer in result.layers] == ["q", "k", "matmul", "matmul_1", "out"]
    weight = net.q.weight.detach()
    assert result["q"]["weight"].sqnr == pytest.approx(sqnr([(weight, on_grid(weight))]), abs=1e-3)
    assert result["q"]["input"].sqnr == pytest.approx(sqnr([(x, on_grid(x)) for x, _ in batches()]), abs=1e-3)
    assert result["k"]["input"] == result["q"]["input"]  # one quantization serves both
    assert [role.role for role in result["matmul"].roles] == ["input", "other", "grad_output"]
    assert [role.role for role in result["out"].roles] == ["input", "weight", "grad_output"]
    assert result["out"]["grad_output"].format == "e5m2/tensor"
    assert sum(result["q"]["input"].exponents.values()) == 2 * 4 * 8 * 16
    assert result["q"]["input"].range == (-9, -6, 8)
    assert max(result["q"]["input"].exponents) == 8  # the scale brings the largest to 448


def loss_of(model: nn.Module, exempt: list[str]) -> float:
    fast = fp8fx.compile(model, "hybrid", exempt=exempt).eval()
    with torch.no_grad():
        return sum(F.cross_entropy(fast(x).flatten(0, 1), y.flatten()).item() for x, y in batches()) / 2


def test_losses_are_those_of_recipes_that_say_so(net: Net, result: Sensitivity) -> None:
    names = [layer.name for layer in result.layers]
    assert result.full == pytest.approx(loss_of(net, []), rel=1e-7)
    assert result["q"].alone == pytest.approx(loss_of(net, [name for name in names if name != "q"]), rel=1e-7)
    assert result["matmul"].without == pytest.approx(loss_of(net, ["matmul"]), rel=1e-7)
    assert len({layer.alone for layer in result.layers} | {result.high}) == 6


def test_roles_of_direct_and_emulated_attention_and_a_tied_table() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(12, 16), nn.Linear(16, 48), nn.Linear(16, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            q, k, v = self.mix(self.table(index)).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v))

    torch.manual_seed(0)
    index = torch.randint(0, 12, (2, 6))
    found = fp8fx.sensitivity(Tied(), [(index, index)], {"extends": "direct", "defaults": {"attention": "emulate"}})
    assert found["table"].roles[0].role == "weight"
    assert {"input", "weight", "output", "grad_output", "grad_input", "grad_weight"} == {role.role for role in found["head"].roles}
    assert {"query", "key", "value"} <= {role.role for role in found["attention"].roles}
    assert found["mix"].formats.startswith("e5m2 x e5m2")


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_scales_that_are_kept_come_from_the_batches(net: Net, recipe: str) -> None:
    grads = [p.grad for p in net.parameters()]
    found = fp8fx.sensitivity(net, batches(), recipe, switch_off=False)
    assert all(before is p.grad for before, p in zip(grads, net.parameters(), strict=True))
    assert min(layer.sqnr for layer in found.layers) > 25
    assert all(role.overflow == 0 for layer in found.layers for role in layer.roles)
    assert found.layers[0].without is None


def test_overflow_and_underflow_are_told(net: Net) -> None:
    huge = {"extends": "hybrid", "defaults": {"input": {"format": "e4m3fn", "scaling": "none", "overflow": "nonfinite"}}}
    found = fp8fx.sensitivity(net, [(1000 * x, y) for x, y in batches()], huge, gradients=False, exempt=["k", "matmul*", "out"])
    role = found["q"]["input"]
    assert 0.5 < role.overflow < 1
    assert role.sqnr == -math.inf
    assert found.effect(found["q"]) == math.inf or math.isfinite(found["q"].alone)
    tiny = {"extends": "hybrid", "defaults": {"weight": {"format": "e4m3fn", "scaling": "none"}}}
    with torch.no_grad():
        net.q.weight.mul_(2.0**-9)
        found = fp8fx.sensitivity(net, batches(), tiny, gradients=False)
        net.q.weight.mul_(2.0**9)
    assert found["q"]["weight"].underflow == 1
    assert found["q"]["weight"].sqnr == pytest.approx(0, abs=1e-9)


def test_a_suggestion_extends_the_recipe_and_is_loaded_back(net: Net, result: Sensitivity, tmp_path: Path) -> None:
    limit = result.high + 0.4 * abs(result.full - result.high)
    recipe = result.suggest(0.4 * abs(result.full - result.high))
    made = result.suggestion
    assert made is not None
    assert made.loss <= limit
    result.save_suggestion(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith("# Suggested by fp8fx.sensitivity: ")
    assert "extends: hybrid" in text
    assert fp8fx.Recipe.load(tmp_path / "mine.yaml") == recipe
    assert loss_of(net, made.exempt) == pytest.approx(made.loss, rel=1e-7)
    plan = fp8fx.plan(net, tmp_path / "mine.yaml", example_inputs=batches()[0][0])
    assert [row.name for row in plan.exempt] == made.exempt
    assert all(": sensitivity: alone in FP8 it adds" in row.reason for row in plan.exempt)


def test_a_lower_loss_in_fp8_needs_no_exemption(net: Net) -> None:
    def better(model: nn.Module, batch: Any) -> Tensor:
        return -(model(batch[0]) - net.eval()(batch[0])).square().mean()  # high precision is the worst there is: 0

    found = fp8fx.sensitivity(net, batches(), {"extends": "hybrid", "rules": []}, loss=better, gradients=False, budget="0%")
    net.train()
    assert found.suggestion is not None
    assert found.suggestion.exempt == []
    assert found.suggestion.loss == found.full < 0


def test_written_forms(result: Sensitivity, tmp_path: Path) -> None:
    printed = str(result)
    assert "sensitivity of Net, recipe hybrid" in printed
    assert "matmul_1  input        e4m3fn/tensor" in printed
    result.to_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in result.layers]
    assert data["layers"][0]["roles"][0]["sqnr"] == result["q"]["input"].sqnr
    result.to_html(tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 1 + sum(len(layer.roles) for layer in result.layers)
    for outside in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    open_tags: list[str] = []

    class Balanced(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "rect", "line"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert tag in ("rect", "line") or open_tags.pop() == tag

    Balanced().feed(page)
    assert open_tags == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]  # no temporary file is left
