"""insert_qdq: explicit quantize nodes and fp8fx operators, with the numbers of the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Oracle
from passes.models import SINGLE, TOGETHER, Feed, Shared
from passes.numbers import LinearReference, quantized
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from fp8fx.clone import runtime_of
from fp8fx.graph_call import GraphCall
from fp8fx.passes.contract import decision

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(scope="module")
def feed() -> Trace:
    make, inputs = TOGETHER["feed gelu"]
    return Trace(make(), "hybrid", *inputs())


def test_insert_qdq_golden(feed: Trace) -> None:
    feed.check_golden("insert_qdq", "insert_qdq")


def test_insert_qdq_golden_direct() -> None:
    make, inputs = TOGETHER["chain"]
    Trace(make(), "direct", *inputs()).check_golden("insert_qdq_direct", "insert_qdq")


def test_insert_qdq_modified_true(feed: Trace) -> None:
    assert feed.result("insert_qdq").modified


def test_insert_qdq_modified_false_where_nothing_is_fp8() -> None:
    assert not Trace(nn.Sequential(nn.Linear(8, 8)), "none", randn(2, 8)).result("insert_qdq").modified


def test_insert_qdq_is_idempotent(feed: Trace) -> None:
    feed.assert_idempotent("insert_qdq")


def test_no_site_is_left_undone(feed: Trace) -> None:
    nodes = feed.graph("insert_qdq").graph.nodes
    assert not [node for node in nodes if (made := decision(node)) is not None and made.mode == "fp8"]


def backward(trace: Trace, inputs: tuple[Any, ...]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, gradients of inputs and parameters, and the gradient they were made from."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    trace.model.zero_grad()
    y = trace.fast(*given)
    grad = randn(*y.shape, seed=9)
    y.backward(grad)
    found = [x.grad for x in given if x.is_floating_point()] + [p.grad for p in trace.model.parameters()]
    assert all(g is not None for g in found)
    return y.detach(), found, grad  # type: ignore[return-value]


@pytest.mark.parametrize("name", SINGLE)
def test_every_operation_agrees_with_float64(name: str) -> None:
    """Output and gradients of one site against tests/oracle.py: products and sums in float64 of independently rounded operands.

    Both round the same float32 numbers, so codes are equal; what is left is fp32 accumulation, under 1e-6 of the norm at these sizes.
    """
    make, inputs = SINGLE[name]
    trace = Trace(make(), "hybrid", *inputs())
    assert [row.decision for row in trace.plan.rows] == ["fp8"]
    y, gradients, grad = backward(trace, inputs())
    oracle = Oracle(trace.model, "hybrid", decisions=trace.plan)
    given = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs()]
    expected = oracle(*given)
    expected.backward(grad.double())
    wanted = [x.grad for x in given if x.is_floating_point()] + list(oracle.gradients().values())
    for ours, theirs in zip([y, *gradients], [expected.detach(), *wanted], strict=True):
        assert theirs is not None
        assert (ours.double() - theirs).norm() <= 1e-6 * theirs.norm() + 1e-30, name


# -- granularity, against a float64 computation with a derived bound ---------------------------------------------------------

GRAINS: dict[str, tuple[Any, Any, Any]] = {
    "tensor": ("tensor", "tensor", "tensor"),
    "row": ("row", "row", "row"),
    "row weight": ("tensor", "row", "tensor"),
    "row input": ("row", "tensor", "tensor"),
    "row gradient": ("tensor", "tensor", "row"),
    "blocks": ([1, 4], [4, 4], [1, 4]),
    "blocks, ragged": ([1, 5], [3, 5], [1, 4]),
    "blocks and rows": ([1, 4], "row", "row"),
    "square blocks": ([4, 4], [4, 4], [4, 4]),
}


def grained(input: Any, weight: Any, grad: Any) -> dict[str, Any]:
    roles = {"input": input, "weight": weight, "grad_output": grad}
    return {"extends": "hybrid", "defaults": {role: {"granularity": g} for role, g in roles.items()}}


def assert_close(ours: Tensor, exact: Tensor, size: Tensor, depth: int) -> None:
    """`size`: the product of magnitudes. A sum of n products of codes, which are exact in fp32, passes through at most n additions,
    n block sums, and 4 multiplications and additions of scales and bias: error <= (2 n + 4) 2^-24 size, 2^-22 for good measure.
    """
    bound = (2 * depth + 4) * 2.0**-22 * size + 1e-30
    assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("grains", GRAINS)
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_linear_granularity(grains: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(seeded(nn.Linear, 8, 12))
    trace = Trace(model, grained(*GRAINS[grains]), randn(*shape))
    y, (dx, dw, db), grad = backward(trace, (randn(*shape),))
    wanted = LinearReference(randn(*shape), model[0].weight, model[0].bias, grad, *GRAINS[grains])  # type: ignore[arg-type]
    assert_close(y, *wanted.output, depth=8)
    assert_close(dx, *wanted.grad_input, depth=12)
    assert_close(dw, *wanted.grad_weight, depth=6)
    assert_close(db, *wanted.grad_bias, depth=6)


@pytest.mark.parametrize("grains", ["tensor", "row", "blocks", "blocks, ragged", "square blocks"])
def test_matmul_granularity(grains: str) -> None:
    """Y = A B is the linear of A with the weight B^T; both operands take the role `input` (its block lies along the contraction)."""
    input, _, grad_grain = GRAINS[grains]
    turned = input if isinstance(input, str) else input[::-1]
    make, inputs = SINGLE["matmul"]
    trace = Trace(make(), grained(input, input, grad_grain), *inputs())
    y, (db, da), grad = backward(trace, inputs())
    (a,), (b,) = trace.model.parameters(), inputs()
    right = quantized(b, "e4m3fn", turned, dim=-2)
    assert_close(y, quantized(a, "e4m3fn", input, dim=-1) @ right, a.detach().double().abs() @ b.double().abs() * 1.2, depth=8)
    wanted = quantized(grad, "e5m2", grad_grain, dim=-1) @ quantized(b, "e4m3fn", input, dim=-1).mT
    assert_close(da, wanted, grad.double().abs() @ b.double().abs().mT * 1.4, depth=6)
    wanted = quantized(a, "e4m3fn", turned, dim=-2).mT @ quantized(grad, "e5m2", turned_for(grad_grain), dim=-2)
    assert_close(db, wanted, a.detach().double().abs().mT @ grad.double().abs() * 1.4, depth=4)


def turned_for(grain: Any) -> Any:
    return grain if isinstance(grain, str) else grain[::-1]


# -- which GEMMs, which roles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gemm", ["output", "grad_input", "grad_weight"])
@pytest.mark.parametrize("name", ["linear", "matmul, two operands with gradients", "conv2d", "grouped_mm"])
def test_each_gemm_can_be_switched(gemm: str, name: str) -> None:
    """The GEMM that is switched off gives the plain model's numbers; the others give those of the recipe."""
    make, inputs = SINGLE[name]
    plain = make()
    x = inputs()
    given = [t.clone().requires_grad_(t.is_floating_point()) for t in x]
    y = plain(*given)
    y.backward(randn(*y.shape, seed=9))
    operands = [t for t in (*given, *plain.parameters()) if t.requires_grad][:2]
    exact = dict(zip(("output", "grad_input", "grad_weight"), [y, *(t.grad for t in operands)], strict=True))
    results = []
    for gemms in ({}, {gemm: "high_precision"}):
        recipe = {"extends": "hybrid", "rules": [{"match": "*", "gemms": gemms}]} if gemms else "hybrid"
        trace = Trace(make(), recipe, *x)
        out, grads, _ = backward(trace, x)
        results.append(dict(zip(("output", "grad_input", "grad_weight"), [out, *grads[:2]], strict=True)))
    everywhere, switched = results
    for other in exact:
        if other == gemm:
            torch.testing.assert_close(switched[other], exact[other])  # type: ignore[arg-type]
            assert not torch.allclose(everywhere[other], exact[other], rtol=1e-3)  # type: ignore[arg-type]
        else:
            assert torch.equal(switched[other], everywhere[other])


@pytest.mark.parametrize("roles", [("input",), ("weight",), ("grad_output",), ("input", "weight"), ("input", "grad_output")])
def test_a_role_may_be_none(roles: tuple[str, ...]) -> None:
    recipe = {"extends": "hybrid", "defaults": dict.fromkeys(roles, "none")}
    model = nn.Sequential(seeded(nn.Linear, 8, 12))
    trace = Trace(model, recipe, randn(6, 8))
    assert trace.ops("insert_qdq")["fp8fx.quantize"] == 2 - len({"input", "weight"} & set(roles))
    y, (dx, dw, _), grad = backward(trace, (randn(6, 8),))
    grains = [None if role in roles else "tensor" for role in ("input", "weight", "grad_output")]
    wanted = LinearReference(randn(6, 8), model[0].weight, model[0].bias, grad, *grains)  # type: ignore[arg-type]
    assert_close(y, *wanted.output, depth=8)
    assert_close(dx, *wanted.grad_input, depth=12)
    assert_close(dw, *wanted.grad_weight, depth=6)


def saved(trace: Trace, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        trace.fast(x)
    return kept


@pytest.mark.parametrize("grain", ["tensor", "row"])
def test_save_for_backward_high_precision_keeps_the_input_and_the_numbers(grain: str) -> None:
    results, kept = [], []
    for save in ("fp8", "high_precision"):
        recipe = {"extends": "hybrid", "defaults": {"save_for_backward": save, "input": {"granularity": grain}}}
        trace = Trace(nn.Sequential(seeded(nn.Linear, 8, 12)), recipe, randn(6, 8))
        results.append(backward(trace, (randn(6, 8),)))
        kept.append([t for t in saved(trace, randn(6, 8)) if t.numel() == 48])
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    assert {t.dtype for t in kept[0]} == {torch.float8_e4m3fn}
    assert {t.dtype for t in kept[1]} == {torch.float32}


# -- sharing, meter, random bits ------------------------------------------------------------------------------------------------


def test_the_meter_has_a_row_per_site_with_a_gradient() -> None:
    trace = Trace(seeded(Shared), "hybrid", randn(3, 8))
    module = trace.graph("insert_qdq")
    assert module.meta["fp8_slots"] == ["q", "k", "v"]
    assert [node.name for node in module.graph.find_nodes(op="placeholder")][-1] == "fp8_meter"


def test_no_meter_without_gradients() -> None:
    model = seeded(Shared)
    model.requires_grad_(False)
    trace = Trace(model, "hybrid", randn(3, 8))
    assert "fp8_meter" not in [node.name for node in trace.graph("insert_qdq").graph.find_nodes(op="placeholder")]
    assert not trace.fast(randn(3, 8)).requires_grad


@pytest.mark.parametrize(("recipe", "wanted"), [("hybrid", 0), ("direct", 1)])
def test_random_bits_are_an_input_only_where_something_is_rounded_stochastically(recipe: str, wanted: int) -> None:
    trace = Trace(seeded(Shared), recipe, randn(3, 8))
    names = [node.name for node in trace.graph("insert_qdq").graph.find_nodes(op="placeholder")]
    assert names.count("fp8_rng") == wanted


def test_dequantize_stands_only_where_a_role_rounds_the_output() -> None:
    counts = [Trace(seeded(Feed), recipe, randn(3, 8)).ops("insert_qdq")["fp8fx.dequantize"] for recipe in ("hybrid", "direct")]
    assert counts == [0, 1]  # direct: down's output; up's is fused into gelu


# -- attention --------------------------------------------------------------------------------------------------------------------


def test_attention_in_high_precision_is_one_call() -> None:
    make, inputs = TOGETHER["attention"]
    ops = Trace(make(), "hybrid", *inputs()).ops("insert_qdq")
    assert ops["scaled_dot_product_attention"] == 1
    assert ops["fp8fx.dequantize"] == 0


class Fused(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_emulated_rounds_queries_keys_and_values() -> None:
    """q, k and v take values on the grid; the gradient passes through the rounding, after grad_output rounded dY."""
    recipe = {"extends": "hybrid", "defaults": {"attention": "emulate"}}
    inputs = tuple(randn(2, 4, 8, seed=i) for i in range(3))
    trace = Trace(Fused(), recipe, *inputs)
    assert trace.ops("insert_qdq")["fp8fx.dequantize"] == 3
    given = [x.clone().requires_grad_() for x in inputs]
    y = trace.fast(*given)
    grad = randn(*y.shape, seed=9)
    y.backward(grad)
    exact = [quantized(x, "e4m3fn", "tensor", dim=-1).requires_grad_() for x in inputs]
    q, k, v = exact
    wanted = F.scaled_dot_product_attention(q, k, v)
    wanted.backward(quantized(grad, "e5m2", "tensor", dim=-1))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_a_rewritten_graph_runs_by_itself(feed: Trace) -> None:
    """The graph of any stage, called with the captured inputs and the runtime's, is the model."""
    module = feed.graph("insert_qdq")
    call = GraphCall(runtime_of(feed.fast), module)
    assert torch.equal(call(*feed.values)[0], feed.fast(*feed.inputs))
