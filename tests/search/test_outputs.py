"""Outputs that the base recipe rounds are searched as inputs and weights are; gradients are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from rounded_net import Net
from torch import Tensor, nn

import fp8fx
from fp8fx.ops import observe

DTYPES = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0), "e3m4ieee": (ml_dtypes.float8_e3m4, 15.5)}


def base(**roles: Any) -> dict[str, Any]:
    return {"extends": "hybrid", "defaults": {"output": {"format": "e4m3fn"}, **roles}}


ONLY = base(input="none", weight="none")


def made() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(4, 3, 8, 8) for _ in range(2)]


def by_ml_dtypes(y: Tensor, format: str, top: float) -> Tensor:
    """float64: `y` clipped to `top`, which is the largest value of the format, and cast by ml_dtypes under that scale."""
    dtype, largest = DTYPES[format]
    scale = np.float32(top) / np.float32(largest)
    values = np.clip(y.numpy() * (np.float32(1) / scale), -largest, largest).astype(dtype).astype(np.float32)
    return torch.from_numpy((values * scale).astype(np.float64))


@pytest.mark.parametrize("objective", ["mse", "output"])
def test_the_error_of_an_output_is_that_of_ml_dtypes(objective: str) -> None:
    """One layer: the output's own error and the error in the output are the same thing, and the least one is chosen."""
    torch.manual_seed(0)
    model, x = nn.Linear(16, 32), torch.randn(64, 16)
    fractions = (0.5, 0.8, 1.0)
    result = fp8fx.search(model, x, formats=tuple(DTYPES), max_values=fractions, base=ONLY, objective=objective, progress=False)
    (choice,) = result.choices
    with torch.no_grad():
        y = model(x)
    absmax = float(y.abs().max())
    errors = {
        (format, c): float((by_ml_dtypes(y, format, np.float32(absmax) * np.float32(c)) - y.double()).square().mean())
        for format in DTYPES
        for c in fractions
    }
    best = min(errors, key=lambda key: errors[key])
    assert (choice.role, choice.candidate.format, choice.candidate.fraction) == ("output", *best)
    assert choice.best.mse == pytest.approx(errors[best], rel=1e-6)
    assert choice.largest == absmax
    assert choice.runner_up is not None
    assert choice.runner_up.mse == pytest.approx(sorted(min(errors[f, c] for c in fractions) for f in DTYPES)[1], rel=1e-6)


@pytest.mark.parametrize(("objective", "inputs"), [("mse", "quantized"), ("output", "quantized"), ("output", "float")])
def test_the_recipe_rounds_what_was_found(objective: str, inputs: str, tmp_path: Path) -> None:
    model, data = made()
    path = tmp_path / "found.yaml"
    space: dict[str, Any] = {"formats": ("e4m3fn", "e3m4ieee", "int8"), "max_values": (0.8, 1.0), "granularities": ("tensor", "row")}
    result = fp8fx.search(model, data, base=base(), objective=objective, inputs=inputs, out=path, progress=False, **space)
    assert {c.layer for c in result.choices if c.role == "output"} == {"conv", "up", "matmul", "matmul_1", "head"}
    assert result["conv", "output"].candidate.granularity == "tensor", "the output of a convolution has one scale"
    assert result["head", "output"].candidate.granularity == "row"
    assert "output " in path.read_text()
    found: dict[str, tuple[Tensor, Tensor, Any]] = {}

    def look(site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: Any) -> None:
        if role == "output":
            found[site] = (x.detach(), fp8fx.dequantize(q, scale, spec.format, granularity=spec.granularity), spec)

    fast = fp8fx.compile(model, path).eval()
    observe.OBSERVERS.append(look)
    try:
        with torch.no_grad():
            exact, y = model(data[0]), fast(data[0])
    finally:
        observe.OBSERVERS.remove(look)
    for site, (before, after, spec) in found.items():
        choice = result[site, "output"]
        assert (spec.format, spec.granularity) == (choice.candidate.format, choice.candidate.granularity)
        if choice.fixed:
            expected = by_ml_dtypes(before, spec.format, choice.max_value) if spec.format in DTYPES else None
            assert expected is None or torch.equal(after.double(), expected)
    assert set(found) == {"conv", "up", "matmul", "matmul_1", "head"}
    with torch.no_grad():
        plain = fp8fx.compile(model, base()).eval()(data[0])
    assert float((y - exact).norm()) < float((plain - exact).norm())


def test_roles_say_what_is_searched() -> None:
    model, data = made()
    args: dict[str, Any] = {"formats": "int8", "progress": False}
    only = fp8fx.search(model, data, base="direct", roles="output", **args)
    assert {c.role for c in only.choices} == {"output"}
    role = only.document["rules"][0]["output"]
    assert (role["format"], role["scaling"], role["max_value"]) == ("int8", "fixed", only.choices[0].max_value)
    assert {c.role for c in fp8fx.search(model, data, base="direct", **args).choices} == {"input", "weight", "output"}
    assert {c.role for c in fp8fx.search(model, data, **args).choices} == {"input", "weight"}, "hybrid rounds no output"
    with pytest.raises(fp8fx.ModelError, match="there is nothing to search: no layer has a quantized output under this base recipe"):
        fp8fx.search(model, data, roles="output", **args)
    with pytest.raises(fp8fx.ModelError, match=r"got 'grad_output'; .* Gradients are there in training only"):
        fp8fx.search(model, data, roles=("output", "grad_output"), **args)
    with pytest.raises(fp8fx.ModelError, match=r"nothing for the output of layer 'conv' .*Add 'tensor' to granularities"):
        fp8fx.search(model, data, base=ONLY, granularities="row", **args)


def test_the_outputs_before_a_layer_count_as_its_input() -> None:
    """Under inputs: quantized a layer sees rounded outputs: coarse ones before it make its own error larger."""
    model, data = made()
    args: dict[str, Any] = {"formats": ("e5m2",), "max_values": (1.0,), "objective": "output", "progress": False, "base": ONLY}
    quantized, plain = (fp8fx.search(model, data, inputs=inputs, **args) for inputs in ("quantized", "float"))
    assert quantized["conv", "output"].best.mse == pytest.approx(plain["conv", "output"].best.mse, rel=1e-6), "nothing lies before it"
    assert quantized["head", "output"].best.mse > 1.5 * plain["head", "output"].best.mse


def test_outputs_that_overflow_name_the_layer() -> None:
    model, data = made()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    with pytest.raises(fp8fx.ModelError, match=r"layer 'head': .* elements of its output are NaN or inf in calibration"):
        fp8fx.search(model, data, base=ONLY, progress=False)


def test_a_product_named_after_a_parameter_has_a_rule_that_loads() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.table)

    torch.manual_seed(0)
    model, x = Bare(), torch.randn(4, 8)
    result = fp8fx.search(model, x, formats="int8", progress=False)
    assert result.document["rules"][0]["match"] == "table"
    assert fp8fx.plan(model, result.recipe, example_inputs=x)["table"].spec.weight.format == "int8"
    trained: Any = fp8fx.qat(model, "int8", data=x).eval()
    with torch.no_grad():
        assert torch.allclose(trained(x), fp8fx.compile(model, trained.recipe()).eval()(x), atol=1e-6)
