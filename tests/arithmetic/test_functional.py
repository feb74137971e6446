"""matmul and linear as a user calls them: gradients, dtypes, torch.compile, and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8fx.arithmetic import form_of, linear, matmul
from fp8fx.errors import ModelError


def test_gradients_are_straight_through() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(4, 5)
    matmul(a, b, "multiplier=mitchell/accumulate=float16").backward(grad)
    torch.testing.assert_close(a.grad, grad @ b.mT)
    torch.testing.assert_close(b.grad, a.mT @ grad)


def test_gradients_of_rounded_operands() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(4, 5)
    matmul(a, b, "operands=e5m2").backward(grad)
    torch.testing.assert_close(a.grad, grad @ b.detach().to(torch.float8_e5m2).float().mT)


def test_gradients_under_the_same_arithmetic() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(3, 4, 5)
    text = "multiplier=mitchell/products=e5m6"
    matmul(a, b, text + "/gradients=same").backward(grad)
    torch.testing.assert_close(a.grad, matmul(grad, b.detach().mT, text), rtol=0, atol=0)
    torch.testing.assert_close(b.grad, matmul(a.detach().mT, grad, text).sum(0), rtol=0, atol=0)
    assert not torch.equal(a.grad, grad @ b.detach().mT)  # type: ignore[arg-type]


def test_linear() -> None:
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    y = linear(x.bfloat16(), w.bfloat16(), bias.bfloat16(), {"accumulate": "hopper_fast"})
    assert (y.shape, y.dtype) == ((2, 3, 5), torch.bfloat16)
    assert linear(x[0, 0], w).shape == (5,)


def test_the_result_dtype() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(4, 6) * 8).to(torch.float8_e4m3fn), torch.randn(6, 5).to(torch.float8_e5m2)
    y = matmul(a, b, "exact")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, a.float() @ b.float())
    assert linear(a, b.mT, torch.ones(5).half()).dtype == torch.float32
    assert matmul(a, b.to(torch.float16), "exact").dtype == torch.float32
    assert torch.equal(matmul(a, b, "exact", dtype=torch.bfloat16), y.bfloat16())
    big = torch.full((1, 64), 64.0, dtype=torch.float16, requires_grad=True)
    assert matmul(big, big.mT, "exact").item() == float("inf")
    kept = matmul(big, big.mT.detach(), "exact", dtype=torch.float32)
    assert kept.item() == 2.0**18
    kept.sum().backward()
    assert big.grad is not None
    assert torch.equal(big.grad, big.detach())
    for wrong in (torch.float8_e5m2, torch.int32, "float32"):
        with pytest.raises(ModelError, match=r"dtype: got .*; allowed: torch.float32"):
            matmul(a, b, "exact", dtype=wrong)  # type: ignore[arg-type]


def test_under_torch_compile() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5)
    run = torch.compile(lambda a, b: matmul(a * 2, b, "accumulate=float16").relu(), fullgraph=True, backend="aot_eager")
    y = run(a, b)
    assert torch.equal(y, matmul(a * 2, b, "accumulate=float16").relu())
    (g,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(g, 2 * (y > 0).float() @ b.mT)


def test_opcheck() -> None:
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fp8fx.arithmetic_mm.default, (a, b, "accumulate=float16", False, 3, "output"))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), r"\[2, 3\] by \[4, 2\]: the last of a and the last but one of b must be equal"),
        (torch.ones(3), torch.ones(3, 2), "a must have 2 or more dimensions"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(3, 2), "a must be a floating point tensor, got torch.int32"),
        (torch.ones(2, 3), [[1.0]], "b must be a floating point tensor, got list"),
        (torch.ones(2, 3), torch.ones(3, 2, device="meta"), "a is on cpu and b on meta"),
    ],
)
def test_wrong_operands(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        matmul(a, b, "accumulate=float16")


def test_wrong_arithmetic() -> None:
    with pytest.raises(ModelError, match="an arithmetic is an Arithmetic, its text or a mapping of its keys; got int"):
        matmul(torch.ones(2, 2), torch.ones(2, 2), 3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="x must be"):
        linear(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ModelError, match=r"bias must be \[3\], one element per row of w \[3, 2\]; got \[2\]"):
        linear(torch.ones(4, 2), torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ModelError, match=r"x \[4, 2\] and w \[3, 5\]: their last dimensions, K, must be equal"):
        linear(torch.ones(4, 2), torch.ones(3, 5))
    with pytest.raises(ModelError, match="bias must be a floating point tensor, got list"):
        linear(torch.ones(4, 2), torch.ones(3, 2), [1.0, 2.0, 3.0])  # type: ignore[arg-type]


def test_form_of_takes_text() -> None:
    assert form_of("products=e5m2") == form_of({"products": "e5m2"}) == "tiles"
    assert form_of("multiplier=mitchell", ("e4m3fn", "e4m3fn")) == "factored"
