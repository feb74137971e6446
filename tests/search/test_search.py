"""The search picks what is known to be best, and its recipe runs what it measured; mistakes leave no file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.numerics import quantize_tensor
from fp8fx.search.candidates import Candidate, candidates, errors, ranked
from fp8fx.spec import TensorSpec

FORMATS = ("e5m2", "e4m3none", "e3m4none", "e2m5none", "int8")
COUNT = 20_000


def quantiles(density: str) -> Tensor:
    """COUNT points with equal probability between them, so that no run is luckier than another."""
    if density == "uniform":
        return (torch.arange(COUNT, dtype=torch.float64) + 0.5).div(COUNT / 2).sub(1).float()
    freedom = {"normal": math.inf, "student 8": 8.0, "student 3": 3.0}[density]
    grid = torch.linspace(-math.asinh(1000.0), math.asinh(1000.0), 100_001, dtype=torch.float64).sinh()
    if math.isinf(freedom):
        height = (-grid.square() / 2).exp()
    else:
        height = (1 + grid.square() / freedom) ** (-(freedom + 1) / 2)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), ((height[1:] + height[:-1]) / 2 * grid.diff()).cumsum(0)])
    wanted = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT * mass[-1]
    place = torch.searchsorted(mass, wanted).clamp(1, len(grid) - 1)
    share = (wanted - mass[place - 1]) / (mass[place] - mass[place - 1]).clamp(min=1e-300)
    return (grid[place - 1] + share * (grid[place] - grid[place - 1])).float()


@pytest.mark.parametrize(
    ("density", "best"), [("uniform", "int8"), ("normal", "e2m5none"), ("student 8", "e2m5none"), ("student 3", "e3m4none")]
)
def test_the_known_best_format_wins(density: str, best: str) -> None:
    """As in the table of the numerics page (its figures are tests/numerics/test_flexible.py). A tail as heavy as with 3 degrees of
    freedom wants one more exponent bit."""
    found = fp8fx.search_format(quantiles(density), FORMATS)
    assert found.format == best, str(found)
    assert str(found).split("\n")[1].startswith(best)
    if density == "uniform":  # without a tail, quantiles are the density
        assert -10 * math.log10(found.best.mse) == pytest.approx(52.90, abs=0.1)


def test_outliers_want_exponent_bits_or_rows() -> None:
    """One element in a thousand is 1000 times as large: integers lose the others. By rows they do not meet."""
    torch.manual_seed(0)
    x = torch.randn(30_000)
    x[::1000] *= 1000
    relative = ranked(errors(x.reshape(1, -1), candidates(FORMATS, ["tensor"], [1.0])))
    assert relative[0].candidate.format in ("e4m3none", "e3m4none")
    assert fp8fx.search_format(x.reshape(-1, 10), ["int8"], granularities=["tensor", "row"]).granularity == "row"


def test_the_error_is_that_of_the_numerics() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    for granularity in ("tensor", "row", (1, 8), (16, 16)):
        candidate = Candidate("e3m4fn", granularity, 0.7)
        q, scale, _ = quantize_tensor(x, TensorSpec(format="e3m4fn", granularity=granularity, clip=0.7))
        expected = (fp8fx.dequantize(q, scale, "e3m4fn", granularity=granularity) - x).double().square().mean()
        assert errors(x, [candidate])[0].mse == pytest.approx(float(expected), rel=1e-6)


class Net(nn.Module):
    """Three kinds of sites: a convolution, a product of two activations, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.Linear(36, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        y = self.up(torch.softmax(y @ y.mT / 8, -1) @ y)
        return self.head(F.gelu(y).mean(1))


def made(count: int = 2) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(4, 3, 8, 8) for _ in range(count)]


def distance(recipe: Any, model: nn.Module, x: Tensor) -> float:
    """dB between the outputs in high precision and under `recipe`."""
    with torch.no_grad():
        y = model(x)
        return float(20 * torch.log10(y.norm() / (y - fp8fx.compile(model, recipe).eval()(x)).norm()))


@pytest.mark.parametrize("objective", ["mse", "output"])
def test_the_recipe_runs_what_was_found(objective: str, tmp_path: Path) -> None:
    model, data = made()
    path = tmp_path / "found.yaml"
    space: dict[str, Any] = {"granularities": ("tensor", "row"), "max_values": (0.8, 0.9, 1.0)}
    result = fp8fx.search(model, data, formats=FORMATS, objective=objective, out=path, progress=False, **space)
    assert {c.layer for c in result.choices} == {"conv", "matmul", "matmul_1", "up", "head"}
    loaded = fp8fx.Recipe.load(path)
    assert loaded == result.recipe
    text = path.read_text()
    assert text.startswith("# Found by fp8fx.search")
    assert "runner-up" in text
    choice = result["up", "weight"]
    spec = fp8fx.plan(model, path, example_inputs=data[0])["up"].spec
    assert (spec.weight.format, spec.weight.granularity) == (choice.candidate.format, choice.candidate.granularity)
    assert choice.runner_up is not None
    assert choice.runner_up.mse >= choice.best.mse
    assert distance(path, model, data[0]) > distance("hybrid", model, data[0]) + 6
    assert distance(path, model, data[0]) > distance({"extends": "hybrid", "defaults": {"input": {"format": "e5m2"}}}, model, data[0])


def test_a_fixed_value_is_the_largest_of_the_grid() -> None:
    model, data = made()
    result = fp8fx.search(model, data, formats="int8", layers="up", progress=False)
    choice = result["up", "weight"]
    largest = model.up.weight.detach().abs().max().item()
    assert choice.max_value == pytest.approx(choice.candidate.fraction * largest, rel=1e-5)
    spec = fp8fx.plan(model, result.recipe, example_inputs=data[0])["up"].spec
    assert (spec.weight.scaling, spec.weight.max_value) == ("fixed", choice.max_value)
    assert [c.layer for c in result.choices] == ["up", "up"]
    assert fp8fx.plan(model, result.recipe, example_inputs=data[0])["conv"].spec.input.format == "e4m3fn"
    current = fp8fx.search(model, data, formats="int8", layers="up", roles="input", scaling="current", progress=False)
    (only,) = current.choices
    assert current.document["rules"][0]["input"] == {
        "format": "int8", "granularity": "tensor", "scaling": "current", "clip": only.candidate.fraction,
    }  # fmt: skip


def test_output_error_prefers_what_the_layer_needs() -> None:
    """A channel that the weight ignores is as large as all others together: the tensor's own error is its error, the output's is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    x = torch.randn(512, 64) * 0.02
    x[:, 0] = torch.randn(512)
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
    args: dict[str, Any] = {"formats": ("int8", "e3m4fn"), "max_values": (0.03, 1.0), "progress": False, "roles": "input"}
    by_mse = fp8fx.search(model, x, **args)["0", "input"]
    assert by_mse.candidate == Candidate("e3m4fn", "tensor", 1.0)
    by_output = fp8fx.search(model, x, objective="output", **args)["0", "input"]
    assert by_output.candidate.fraction == 0.03
    assert by_output.best.sqnr > by_mse.best.sqnr + 6


def test_inputs_from_the_quantized_model_count_the_errors_before() -> None:
    model, data = made()
    args: dict[str, Any] = {"formats": ("e3m2",), "max_values": (1.0,), "objective": "output", "progress": False}
    quantized, plain = (fp8fx.search(model, data, inputs=inputs, **args) for inputs in ("quantized", "float"))
    assert quantized["conv", "weight"].best.mse == pytest.approx(plain["conv", "weight"].best.mse, rel=1e-6), "nothing lies before it"
    assert quantized["up", "weight"].best.mse > 1.5 * plain["up", "weight"].best.mse


def test_convolutions_with_a_scale_per_output_channel() -> None:
    """Outputs and gradients of the pipeline against dequantized weights in plain torch."""
    torch.manual_seed(0)
    for conv, shape in ((nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)), (nn.Conv1d(3, 5, 2), (2, 3, 9))):
        conv.weight.data *= torch.logspace(-2, 2, conv.weight.shape[0]).reshape(-1, *[1] * (conv.weight.dim() - 1))
        recipe = {"extends": "hybrid", "defaults": {"input": "none", "grad_output": "none", "weight": {"granularity": "row"}}}
        x = torch.randn(shape, requires_grad=True)
        y = fp8fx.compile(nn.Sequential(conv), recipe)(x)
        y.square().sum().backward()
        got, x.grad = (x.grad, conv.weight.grad, y.detach()), None
        conv.weight.grad = None
        rows = conv.weight.detach().flatten(1)
        scale = fp8fx.compute_scale(rows, "e4m3fn", "row")
        weight = fp8fx.fake_quantize(rows, "e4m3fn", scale).reshape(conv.weight.shape).requires_grad_()
        y = conv._conv_forward(x, weight, conv.bias)
        y.square().sum().backward()
        for ours, theirs in zip(got, (x.grad, weight.grad, y.detach()), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_model_is_left_alone_and_dicts_of_arguments_serve() -> None:
    model, data = made(1)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    as_dict = fp8fx.search(model, {"x": data[0]}, formats="int8", progress=False)
    pairs = fp8fx.search(model, [(data[0], 3)], formats="int8", forward=lambda model, batch: model(batch[0]), progress=False)
    assert as_dict.document == pairs.document
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def stops_midway() -> Iterator[Tensor]:
    yield torch.randn(4, 3, 8, 8)
    raise OSError("the disk is gone")


NAN = torch.full((4, 3, 8, 8), math.nan)
GOOD = torch.zeros(4, 3, 8, 8)
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([], {}, "data is empty: it gave no batch"),
    "no elements": ([torch.zeros(0, 3, 8, 8)], {}, r"batch 0 is empty: it holds a tensor of shape \(0, 3, 8, 8\)"),
    "not finite": ([GOOD, NAN], {}, "batch 1 is not finite: 768 of the 768 elements"),
    "wrong shape": ([GOOD, torch.zeros(4, 2, 8, 8)], {}, r"cannot run on calibration batch 1 \(float32 \(4, 2, 8, 8\)\)"),
    "other form": ([GOOD, GOOD[0]], {}, "batch 1 has another form than batch 0"),
    "exhausted": ([GOOD, GOOD], {"batches": 3}, "exhausted midway: batches=3, and it gave 2"),
    "no tensors": (["text"], {}, "batch 0 holds no tensor: it is a str"),
    "no data": (3, {}, "an iterable of batches; got int"),
    "labels": ([(GOOD, torch.zeros(4))], {}, "give forward=lambda model, batch"),
    "zero batches": ([GOOD], {"batches": 0}, "an int from 1 on, or None for all; got 0"),
    "no formats": ([GOOD], {"formats": ()}, "search space is empty: formats has no entry"),
    "no values": ([GOOD], {"max_values": []}, "search space is empty: max_values has no entry"),
    "no granularities": ([GOOD], {"granularities": []}, "search space is empty: granularities has no entry"),
    "no roles": ([GOOD], {"roles": ()}, "search space is empty: roles has no entry"),
    "negative": ([GOOD], {"max_values": [1.0, -0.5]}, "numbers above 0 .* got -0.5"),
    "unknown format": ([GOOD], {"formats": ("e4m3fnn",)}, "Did you mean 'e4m3fn'"),
    "unknown granularity": ([GOOD], {"granularities": ("rows",)}, "granularities are tensor, row"),
    "unknown role": ([GOOD], {"roles": ("weights",)}, "Did you mean 'weight'"),
    "unknown objective": ([GOOD], {"objective": "outputs"}, "Did you mean 'output'"),
    "unknown layer": ([GOOD], {"layers": "u"}, "no layer that is quantized matches 'u'. Did you mean 'up'"),
    "nothing to search": ([GOOD], {"base": "none"}, "there is nothing to search"),
    "rows for an input of a convolution": ([GOOD], {"granularities": "row", "layers": "conv"}, "Add 'tensor' to granularities"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_leave_no_file(name: str, tmp_path: Path) -> None:
    data, kwargs, message = MISTAKES[name]
    path = tmp_path / "found.yaml"
    path.write_text("# mine\n")
    with pytest.raises(fp8fx.FP8Error, match=message):
        fp8fx.search(made(1)[0], data, out=path, progress=False, **({"formats": "int8"} | kwargs))
    assert path.read_text() == "# mine\n"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_loader_and_of_the_disk_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        fp8fx.search(made(1)[0], stops_midway(), out=tmp_path / "found.yaml", progress=False)
    assert list(tmp_path.iterdir()) == []
    result = fp8fx.search(made(1)[0], made(1)[1], formats="int8", layers="head", progress=False)
    with pytest.raises(fp8fx.RecipeError, match="cannot be written"):
        result.save(tmp_path / "missing" / "found.yaml")


def test_a_place_that_cannot_be_written_is_known_before_the_search(tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError("the search has begun")

    for place, message in ((tmp_path / "missing" / "found.yaml", "there is no folder"), (tmp_path, "it is a directory")):
        with pytest.raises(fp8fx.FP8Error, match=message):
            fp8fx.search(made(1)[0], [GOOD], out=place, forward=forward, progress=False)


BAD = {"shape": [GOOD, torch.zeros(4, 2, 8, 8)], "dtype": torch.zeros(4, 3, 8, 8, dtype=torch.int64), "first": GOOD[:, :2]}


@pytest.mark.parametrize("name", BAD)
def test_data_that_the_model_cannot_take_is_said_once_and_plainly(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The plain model meets it first: no capture has begun whose log and symbols would come before the message."""
    for run in (lambda: fp8fx.search(made(1)[0], BAD[name], progress=False), lambda: fp8fx.qat(made(1)[0], data=BAD[name])):
        with pytest.raises(fp8fx.ModelError, match=r"the model cannot run on calibration batch \d \(\w+ \(4, \d, 8, 8\)\): .*") as caught:
            run()
        assert ".." not in str(caught.value).replace("lambda model, batch: ...", "")
        assert "FakeTensor" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_overflows_names_the_layer() -> None:
    model, data = made(1)
    with torch.no_grad():
        model.conv.weight.fill_(3e38)
    with pytest.raises(fp8fx.ModelError, match=r"layer 'matmul': .* are NaN or inf in calibration"):
        fp8fx.search(model, data, progress=False)


def test_single_tensors_that_cannot_be_searched() -> None:
    for x, message in ((torch.zeros(3), "all 3 elements of x are zero"), (torch.zeros(0), "has no elements"), (NAN, "is not finite")):
        with pytest.raises(fp8fx.ModelError, match=message):
            fp8fx.search_format(x)
    with pytest.raises(fp8fx.ModelError, match=r"must be a floating point tensor, got torch.int64"):
        fp8fx.search_format(torch.arange(3))
