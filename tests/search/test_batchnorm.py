"""Folding batch norms, and estimating their statistics again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import fp8fx
from fp8fx.demo.models import DigitsResNet

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def worn(model: nn.Module, *shape: int) -> nn.Module:
    """The model in evaluation, with statistics and affine parameters that are not those of a new norm."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(*shape) * 2 + 1)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, BATCH_NORMS) for module in model.modules())


class Shared(nn.Module):
    """What must not be folded: an output that is read twice, a layer called twice, a norm before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(4))
        self.na, self.nb, self.nc, self.nd = (nn.BatchNorm1d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.na(y) + y
        y = self.nb(self.b(self.b(y)))
        y = self.c(self.nc(y))
        return F.relu(self.nd(self.d(y)))


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (8, 4)),
    "no bias, not affine": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)), (8, 4, 5, 5)),
    "groups": (nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8)), (8, 4, 9)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (8, 4, 5, 5)),
    "transposed in groups": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (8, 4, 5, 5)),
    "3-d": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (4, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("captured", [False, True])
def test_folding_keeps_the_output(name: str, captured: bool) -> None:
    layers, shape = LAYERS[name]
    model, x = worn(layers, *shape), torch.randn(shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fp8fx.fold_batchnorm(model, x if captured else None)
    assert norms(folded) == 0
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {id(p) for p in folded.parameters()} & {id(p) for p in model.parameters()}


def test_a_residual_network_folds_as_a_whole() -> None:
    model, x = worn(DigitsResNet(width=8), 16, 1, 8, 8), torch.randn(4, 1, 8, 8)
    folded = fp8fx.fold_batchnorm(model, x)
    assert norms(model) == 9
    assert norms(folded) == 0
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert fp8fx.plan(folded, example_inputs=x).fp8_flops_share == 1.0


def test_only_what_stays_right_is_folded() -> None:
    model, x = worn(Shared(), 8, 4, 9), torch.randn(8, 4, 9)
    folded = fp8fx.fold_batchnorm(model)
    assert [name for name, module in folded.named_modules() if isinstance(module, nn.Identity)] == ["nd"]
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)
    hooked = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(fp8fx.FP8Warning, match="none could be folded"):
        assert norms(fp8fx.fold_batchnorm(hooked)) == 1


@pytest.mark.parametrize("recipe", ["none", "hybrid"])
def test_recalibration_gives_the_means_over_batches(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    fast: Any = fp8fx.compile(model, recipe)
    batches = [torch.randn(8, 2, 6, 6) + n for n in range(3)]
    with torch.no_grad(), fp8fx.autocast(enabled=recipe != "none"):
        outputs = [fp8fx.compile(nn.Sequential(model[0]), recipe)(x) for x in batches]
    fast.train()
    assert fp8fx.recalibrate_batchnorm(fast, iter(batches), batches=3) == 1
    assert fast.training
    assert fast[1].momentum == 0.1
    statistics = [(y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)) for y in outputs]
    for buffer, values in zip((model[1].running_mean, model[1].running_var), zip(*statistics, strict=True), strict=True):
        assert torch.allclose(buffer, torch.stack(values).mean(0), rtol=1e-4, atol=1e-6)
    if recipe == "none":
        update_bn(batches, model)  # torch's own: its mean over batches is the same
        assert torch.allclose(model[1].running_var, torch.stack([v for _, v in statistics]).mean(0), rtol=1e-4)


def test_recalibration_that_fails_changes_nothing() -> None:
    model = worn(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 8, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for data, message in (
        ([torch.randn(8, 4), torch.randn(8, 5)], "cannot run on calibration batch 1"),
        ([torch.randn(8, 4), torch.full((8, 4), torch.nan)], "batch 1 is not finite"),
        ([], "is empty"),
    ):
        with pytest.raises(fp8fx.ModelError, match=message):
            fp8fx.recalibrate_batchnorm(model, data)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not model.training
        assert model[1].momentum == 0.1
