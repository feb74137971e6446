"""Corners of the operators and of what becomes one: each test is one promise that a plain model keeps and a rewritten one must."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.layers import OUTPUT_ONLY, Layers, decisions, randn, recipe, similar
from torch import Tensor, nn
from torch.nn import functional as F

import fp8fx
from fp8fx.capture.sites import SITES, UNSUPPORTED

pytestmark = pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")


# -- addmm ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_beta_zero_ignores_the_addend(name: str) -> None:
    lead = (2,) if name == "baddbmm" else ()

    model = Layers(lambda self, x: getattr(torch, name)(self.fc.bias[:6], x, x.mT, beta=0, alpha=2.0))
    with torch.no_grad():
        model.fc.bias.fill_(float("nan"))
    x = randn(*lead, 6, 8)
    fast = fp8fx.compile(model, "hybrid")
    y = fast(x)
    assert y.shape == (*lead, 6, 6)
    assert similar(y, 2 * x @ x.mT)
    y.sum().backward()
    assert torch.equal(fast.fc.bias.grad, torch.zeros(8))


@pytest.mark.parametrize("beta", [0, 1, 0.5])
def test_addmm_under_autocast_keeps_the_dtype(beta: float) -> None:
    model = Layers(lambda self, x: torch.addmm(self.cache, x, self.fc.weight, beta=beta))
    fast = fp8fx.compile(model, "hybrid")
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(randn(8, 8)).dtype == model(randn(8, 8)).dtype == torch.bfloat16


# -- decisions --------------------------------------------------------------------------------------------------------------


def test_out_is_written() -> None:
    model, plain = (Layers(lambda self, x: torch.mm(x, self.fc.weight, out=self.cache) + 0) for _ in range(2))
    with torch.no_grad():
        y, made = decisions(model, "hybrid", randn(8, 8))
        assert torch.equal(y, plain(randn(8, 8)))
    assert torch.equal(model.cache, plain.cache)
    assert ("high_precision", "it writes its result to out=") in made.values()


def test_output_is_a_role_of_its_own() -> None:
    y, made = decisions(Layers(lambda self, x: self.fc(x)), recipe(**OUTPUT_ONLY), randn(4, 8))
    assert made["fc"][0] == "fp8"
    assert torch.equal(y, y.to(torch.float8_e5m2).float())


@pytest.mark.parametrize("role", ["grad_input", "grad_weight"])
def test_a_rounded_gradient_is_a_role_of_its_own(role: str) -> None:
    model = Layers(lambda self, x: self.fc(x))
    grid = {"format": "e5m2", "scaling": "none"}
    fast = fp8fx.compile(model, recipe(input="none", weight="none", grad_output="none", **{role: grid}))
    x = randn(4, 8).requires_grad_()
    fast(x).square().sum().backward()
    assert fast.plan().rows[0].decision == "fp8"
    ours = {"grad_input": x.grad, "grad_weight": fast.fc.weight.grad}[role]
    assert ours is not None
    assert torch.equal(ours, ours.to(torch.float8_e5m2).float())


def test_nothing_is_left_of_an_output_that_is_read_in_high_precision() -> None:
    model = Layers(lambda self, x: F.relu(self.fc(x)))
    y, made = decisions(model, recipe(**OUTPUT_ONLY), randn(4, 8))
    assert made["fc"] == ("high_precision", "no role of this recipe applies here")
    assert torch.equal(y, model(randn(4, 8)))


def test_all_products_in_high_precision() -> None:
    gemms = dict.fromkeys(("output", "grad_input", "grad_weight"), "high_precision")
    _, made = decisions(Layers(lambda self, x: self.fc(x)), recipe(gemms=gemms), randn(4, 8))
    assert made["fc"] == ("high_precision", "all of its products stay in high precision (gemms)")


def test_a_linear_with_a_vector() -> None:
    model = Layers(lambda self, x: F.linear(x, self.fc.bias))
    y, made = decisions(model, "hybrid", randn(4, 8))
    assert torch.equal(y, model(randn(4, 8)))
    assert ("high_precision", "a linear whose weight has 1 dimension") in made.values()


# -- embedding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", [("output",), ("grad_weight",), ("output", "grad_weight")])
def test_embedding_honours_gemms(stays: tuple[str, ...]) -> None:
    table, plain = nn.Sequential(nn.Embedding(10, 8)), nn.Sequential(nn.Embedding(10, 8))
    plain.load_state_dict(table.state_dict())
    fast = fp8fx.compile(table, recipe(gemms=dict.fromkeys(stays, "high_precision")))
    index, dy = torch.tensor([[1, 3, 3], [0, 9, 1]]), randn(2, 3, 8)
    y, expected = fast(index), plain(index)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(y, expected) == ("output" in stays)
    assert torch.equal(fast[0].weight.grad, plain[0].weight.grad) == ("grad_weight" in stays)
    (row,) = fast.plan().rows
    if len(stays) == 2:
        assert (row.decision, row.reason) == ("high_precision", "all of its products stay in high precision (gemms)")
    else:
        assert row.decision == "fp8"


# -- second derivatives -------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused() -> None:
    fast = fp8fx.compile(Layers(lambda self, x: self.fc2(F.gelu(self.fc(x)))), "hybrid", exempt=["fc"])
    x = randn(4, 8).requires_grad_()
    with pytest.raises(fp8fx.FP8Error, match=r"no second derivative.*create_graph=True"):
        torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(fast(x).square().sum(), x)


# -- tokens -----------------------------------------------------------------------------------------------------------------


def test_a_later_flatten_of_the_model_is_its_own() -> None:
    def run(self: Layers, x: Tensor) -> Tensor:
        x = x.view(2, 4, 8) * 1
        y = self.fc(x)
        return y.flatten(0, -2) + torch.flatten(x, 0, -2)

    row = {"granularity": "row"}
    model = Layers(run)
    y, _ = decisions(model, recipe(input=row, weight=row, grad_output=row), randn(8, 8))
    assert similar(y, model(randn(8, 8)))


# -- symbolic ---------------------------------------------------------------------------------------------------------------


def _switch(make: Callable[[], Any]) -> Callable[[Layers, Tensor], Tensor]:
    def run(self: Layers, x: Tensor) -> Tensor:
        with make():
            x = self.fc(x)
        return self.fc2(x)

    return run


SWITCHES = [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False), lambda: torch.autocast("cpu", torch.bfloat16)]


@pytest.mark.parametrize("make", SWITCHES)
def test_symbolic_capture_refuses_switched_modes(make: Callable[[], Any]) -> None:
    with pytest.raises(fp8fx.CaptureError, match=r"(?s)torch\.no_grad.*Capture with TorchDynamo"), torch.enable_grad():
        fp8fx.compile(Layers(_switch(make)), "hybrid", capture="symbolic")(randn(4, 8))


def test_symbolic_capture_refuses_autocast_switched_off() -> None:
    def run(self: Layers, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc(x)

    with pytest.raises(fp8fx.CaptureError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        fp8fx.compile(Layers(run), "hybrid", capture="symbolic")(randn(4, 8))


def test_symbolic_capture_knows_the_dtype_of_autocast() -> None:
    fast = fp8fx.compile(Layers(lambda self, x: self.fc(x)), "hybrid", capture="symbolic")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert fast(randn(4, 8)).dtype == dtype


# -- every product is in the plan -------------------------------------------------------------------------------------------


def _imatmul(self: Layers, x: Tensor) -> Tensor:
    x = x * 1
    return operator.imatmul(x, self.fc.weight)


PRODUCTS: dict[str, tuple[Callable[[Layers, Tensor], Any], str]] = {
    "linalg.matmul": (lambda self, x: torch.linalg.matmul(x, self.fc.weight), "fp8"),
    "imatmul": (_imatmul, "fp8"),
    "multi_dot": (lambda self, x: torch.linalg.multi_dot([x, self.fc.weight, self.fc2.weight]), "high_precision"),
    "chain_matmul": (lambda self, x: torch.chain_matmul(x, self.fc.weight), "high_precision"),
    "inner": (lambda self, x: torch.inner(x, self.fc.weight), "high_precision"),
    "x.inner": (lambda self, x: x.inner(self.fc.weight), "high_precision"),
    "mv": (lambda self, x: torch.mv(self.fc.weight, x[0]), "high_precision"),
    "w.mv": (lambda self, x: self.fc.weight.mv(x[0]), "high_precision"),
    "outer": (lambda self, x: torch.outer(x[0], x[1]), "high_precision"),
    "x.outer": (lambda self, x: x[0].outer(x[1]), "high_precision"),
    "dot": (lambda self, x: torch.dot(x[0], x[1]), "high_precision"),
    "addmm_": (lambda self, x: (x * 1).addmm_(x, self.fc.weight), "high_precision"),
}


@pytest.mark.filterwarnings("ignore:torch.chain_matmul")
@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_in_the_plan(name: str, capture: str) -> None:
    run, decision = PRODUCTS[name]
    model = Layers(run)
    y, made = decisions(model, "hybrid", randn(8, 8), capture=capture)
    ((got, reason),) = [(got, reason) for got, reason in made.values() if got != "not_captured"]
    assert got == decision
    assert reason
    if decision == "high_precision":
        assert torch.equal(y, model(randn(8, 8)))


def test_fused_kernels_are_known() -> None:
    for target in (torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention):
        assert UNSUPPORTED[target]
    assert not SITES.keys() & UNSUPPORTED.keys()
