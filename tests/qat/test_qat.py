"""Quantization-aware training: what is learned, and that the normal pipeline then runs the same numbers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.ops import observe

CHANNELS = {"extends": "hybrid", "defaults": {"weight": {"format": "int8", "granularity": "row"}, "input": {"format": "e3m4fn"}}}


class Net(nn.Module):
    """A convolution, its batch norm, a linear layer, and a product without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x))).flatten(2)  # [B, 8, 36]
        return self.fc((y @ y.mT).mean(1) / 36)


def made(recipe: Any = "e4m3fn", **kwargs: Any) -> tuple[Net, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 8, 8)
    return model, fp8fx.qat(model, recipe, data=x, **kwargs), x


def train(model: Any, x: Tensor, steps: int = 5) -> list[float]:
    labels, losses = torch.arange(len(x)) % 4, []
    own = {id(p) for p in fp8fx.quantizer_parameters(model)}
    weights = [p for p in model.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": fp8fx.quantizer_parameters(model), "weight_decay": 0.0}], lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def seen(model: nn.Module, x: Tensor) -> dict[tuple[str, str], tuple[str, Tensor]]:
    """The values that each quantization of a compiled model gives, and their format."""
    found: dict[tuple[str, str], tuple[str, Tensor]] = {}

    def look(site: str, role: str, x: Tensor, q: Tensor, scale: Tensor, spec: Any) -> None:
        found.setdefault((site, role), (spec.format, fp8fx.dequantize(q, scale, spec.format)))

    fp8fx.invalidate(model)  # weights are quantized anew
    observe.OBSERVERS.append(look)
    try:
        with torch.no_grad():
            model(x)
    finally:
        observe.OBSERVERS.remove(look)
    return found


@pytest.mark.parametrize(
    ("recipe", "learn"), [("e4m3fn", "max_value"), ("e4m3fn", ("max_value", "mantissa_bits")), (CHANNELS, "max_value")]
)
def test_the_learned_recipe_runs_the_same_numbers(recipe: Any, learn: Any) -> None:
    model, trained, x = made(recipe, learn=learn)
    losses = train(trained, x)
    assert losses[-1] < losses[0]
    trained.eval()
    fast = fp8fx.compile(model, trained.recipe()).eval()
    with torch.no_grad():
        ours, theirs = trained(x), fast(x)
    assert torch.allclose(ours, theirs, atol=1e-5), "outputs differ by more than the order of float32 sums"
    assert not torch.allclose(ours, model.eval()(x), atol=1e-4), "nothing was rounded"
    values = seen(fast, x)
    operands = {("conv", "input"): x, ("conv", "weight"): model.conv.weight, ("fc", "weight"): model.fc.weight}
    for (site, role), tensor in operands.items():
        quantizer = trained._fp8fx_qat.get(site, role)
        rows = tensor.detach().flatten(1)
        format, got = values[site, role]
        assert format == quantizer.learned_format
        assert torch.equal(quantizer(rows).detach(), got.flatten(1)), f"{site} {role}"


def test_products_without_a_module_learn_too() -> None:
    _, trained, x = made()
    names = {(site, role) for site, role, _ in trained._fp8fx_qat.items()}
    assert names == {("conv", "input"), ("conv", "weight"), ("matmul", "input"), ("fc", "input"), ("fc", "weight")}
    before = trained._fp8fx_qat.get("matmul", "input").max_value.item()
    train(trained, x)
    assert trained._fp8fx_qat.get("matmul", "input").max_value.item() != before


def test_every_parameter_gets_a_gradient_and_only_what_is_asked_for_learns() -> None:
    model, trained, x = made(learn=("max_value", "mantissa_bits"))
    trained(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is not None for p in fp8fx.quantizer_parameters(trained))
    assert len(fp8fx.quantizer_parameters(trained)) == 10
    _, bits_only, _ = made(learn="mantissa_bits")
    assert len(fp8fx.quantizer_parameters(bits_only)) == 5


def test_copies_pickles_and_state_dicts() -> None:
    model, trained, x = made()
    train(trained, x, 2)
    trained.eval()
    with torch.no_grad():
        y = trained(x)
        assert torch.equal(copy.deepcopy(trained)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(trained))(x), y)
        _, other, _ = made()
        stream = io.BytesIO()
        torch.save(trained.state_dict(), stream)
        stream.seek(0)
        other.load_state_dict(torch.load(stream, weights_only=True))
        assert torch.equal(other.eval()(x), y)
    assert set(fp8fx.strip(trained.state_dict())) == set(model.state_dict())
    assert fp8fx.unwrap(trained) is model
    assert type(trained).__name__ == "Net"
    assert isinstance(trained, Net)


def test_a_checkpoint_file_holds_what_was_learned(tmp_path: Path) -> None:
    _, trained, x = made()
    train(trained, x, 1)
    fp8fx.save(trained, tmp_path / "run.safetensors")
    _, other, _ = made()
    fp8fx.load(tmp_path / "run.safetensors", other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in trained.state_dict().items())
    assert other.recipe() == trained.recipe()
    with pytest.raises(fp8fx.CheckpointError, match=r"of layer 'conv': .* learned for e4m3fn, granularity tensor"):
        fp8fx.load(tmp_path / "run.safetensors", made("e5m2")[1], migrate=True)


def test_a_state_of_other_formats_is_refused_and_nothing_is_loaded() -> None:
    _, trained, x = made()
    train(trained, x, 1)
    rows = {"extends": "hybrid", "defaults": {"weight": {"granularity": "row"}}}
    for recipe, here in (("e5m2", "e5m2, granularity tensor"), (rows, "e4m3fn, granularity row")):
        _, other, _ = made(recipe)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(fp8fx.CheckpointError, match=f"of layer 'conv': .* learned for e4m3fn, granularity tensor, and here is {here}"):
            other.load_state_dict(trained.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
        other.load_state_dict(fp8fx.strip(trained.state_dict()), strict=False)
        assert torch.equal(other.conv.weight, trained.conv.weight)


def test_autocast_switches_it_off_and_the_model_is_untouched() -> None:
    model, trained, x = made("int4")
    trained.eval()
    with torch.no_grad(), fp8fx.autocast(enabled=False):
        assert torch.equal(trained(x), model.eval()(x))
    assert set(model._modules) == {"conv", "bn", "fc"}


def test_exempt_layers_learn_nothing() -> None:
    _, trained, _ = made(exempt=["conv", "matmul"])
    assert {site for site, _, _ in trained._fp8fx_qat.items()} == {"fc"}


def test_statistics_are_estimated_again_under_quantization() -> None:
    _, trained, x = made("int4")
    before = trained.bn.running_var.clone()
    assert fp8fx.recalibrate_batchnorm(trained, [x, x]) == 1
    assert not torch.equal(trained.bn.running_var, before)
    quantizer = {role: trained._fp8fx_qat.get("conv", role) for role in ("input", "weight")}
    rounded = {role: q(t.flatten(1)).view(t.shape) for (role, q), t in zip(quantizer.items(), (x, trained.conv.weight), strict=True)}
    y = F.conv2d(rounded["input"], rounded["weight"])
    assert torch.allclose(trained.bn.running_var, y.transpose(0, 1).flatten(1).var(1), rtol=1e-4)


def test_mistakes() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(fp8fx.ModelError, match="Did you mean 'mantissa_bits'"):
        made(learn="mantissa")
    with pytest.raises(fp8fx.ModelError, match=r"neither a shipped recipe .* nor a format"):
        made("e4m3x")
    with pytest.raises(fp8fx.ModelError, match="nothing to learn"):
        made(learn=())
    with pytest.raises(fp8fx.ModelError, match="no layer has a quantized input, weight or output"):
        fp8fx.qat(Net(), "none", data=x)
    with pytest.raises(fp8fx.ModelError, match="data is empty"):
        fp8fx.qat(Net(), data=[])
    with pytest.raises(fp8fx.ModelError, match=r"not made by fp8fx.qat"):
        fp8fx.quantizer_parameters(Net())
    with pytest.raises(fp8fx.ModelError, match="compiled by fp8fx already"):
        fp8fx.compile(made()[1])


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(
    ("name", "value"), [("log2_max", math.nan), ("log2_max", math.inf), ("log2_max", -math.inf), ("mantissa_bits", math.nan)]
)
def test_what_diverged_gives_nan_and_no_recipe(name: str, value: float, granularity: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    x[0] = 0.0  # a zero is no number either then
    recipe = {"extends": "hybrid", "defaults": {"input": {"granularity": granularity}}}
    trained: Any = fp8fx.qat(model, recipe, data=x, learn=("max_value", "mantissa_bits"))
    assert bool(trained(x).isfinite().all())
    with torch.no_grad():
        getattr(trained._fp8fx_qat.get("0", "input"), name).fill_(value)
    y = trained(x)
    assert bool(y.isnan().all())
    y.sum().backward()
    with pytest.raises(fp8fx.ModelError, match=r"layer '0': what is learned for its input is no longer finite"):
        trained.recipe()


REFUSED: dict[str, tuple[Any, str]] = {
    "arithmetic": ({"extends": "hybrid", "defaults": {"arithmetic": {"products": "float16"}}}, "layer '0' arithmetic: products=float16"),
    "mx": ({"extends": "hybrid", "defaults": {"weight": {"format": "mxfp8_e4m3"}}}, "layer '0' weight: scale_format: e8m0, .* float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_does_not_do_is_refused(name: str) -> None:
    recipe, message = REFUSED[name]
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    with pytest.raises(fp8fx.ModelError, match=message):
        fp8fx.qat(model, recipe, data=x)
    with pytest.raises(fp8fx.ModelError, match="nothing to learn"):  # an exempt layer is no reason to refuse
        fp8fx.qat(model, recipe, data=x, exempt=["0"])


def test_the_learned_recipe_says_what_was_trained_whatever_the_base() -> None:
    base = {"extends": "direct", "defaults": {"output": "none", "input": {"rounding": "stochastic"}, "weight": {"overflow": "nonfinite"}}}
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32)
    trained = fp8fx.qat(model, base, data=x)
    with torch.no_grad():
        assert torch.allclose(fp8fx.compile(model, trained.recipe())(x), trained(x), atol=1e-6)
    spec = fp8fx.plan(model, trained.recipe(), example_inputs=x)["0"].spec
    assert (spec.input.rounding, spec.weight.overflow) == ("nearest_even", "saturate")


def test_an_integer_whose_bits_stay_is_the_same_grid_under_another_name() -> None:
    _, trained, _ = made("int8", learn=("max_value", "mantissa_bits"))
    assert trained._fp8fx_qat.get("fc", "weight").entry()["format"] == "e1m6none"
    x = torch.linspace(-2.0, 2.0, 1001)
    assert torch.equal(*(fp8fx.fake_quantize(x, format, fp8fx.compute_scale(torch.tensor(1.7), format)) for format in ("int8", "e1m6none")))


def test_a_sequential_root_and_transposed_channels() -> None:
    """nn.Sequential calls all its children, of which the quantizers are one; a transposed weight has its output channels second."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), torch.randn(4, 4, 5, 5)
    trained = fp8fx.qat(model, CHANNELS, data=x).eval()
    with torch.no_grad():
        y = fp8fx.compile(model, trained.recipe()).eval()(x)
        assert torch.allclose(trained(x), y, atol=1e-5)
        assert not torch.equal(y, model(x))
