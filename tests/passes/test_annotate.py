"""annotate: a decision with a reason on every site, and never an edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes.models import Attention, Call, ConvNet, Embedding, Experts, grouped_mm_fallback, together, tokens
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from fp8fx.passes.contract import decision
from fp8fx.spec import ROLES

ROW = {"granularity": "row"}


@pytest.fixture(scope="module")
def feed() -> Trace:
    return together("feed gelu", {"extends": "hybrid", "exempt": ["down"]})


def test_annotate_golden(feed: Trace) -> None:
    feed.check_golden("annotate", "annotate")


def test_annotate_modified_true(feed: Trace) -> None:
    assert feed.result("annotate").modified


def test_annotate_modified_false_without_sites() -> None:
    trace = Trace(nn.Sequential(nn.LayerNorm(8), nn.ReLU()), "none", randn(2, 8))
    assert not trace.result("annotate").modified


def test_annotate_is_idempotent(feed: Trace) -> None:
    feed.assert_idempotent("annotate")


def test_annotate_changes_no_edge(feed: Trace) -> None:
    graphs = [[(n.op, n.target, str(n.args), str(n.kwargs)) for n in feed.graph(stage).graph.nodes] for stage in ("capture", "annotate")]
    assert graphs[0] == graphs[1]


def test_every_site_has_one_decision_with_a_reason(feed: Trace) -> None:
    made = [d for node in feed.graph("annotate").graph.nodes if (d := decision(node)) is not None]
    assert [d.name for d in made] == ["up", "down"]
    assert [d.mode for d in made] == ["fp8", "exempt"]
    assert all(d.reason for d in made)
    assert "exempt 'down'" in made[1].reason or "exempt down" in made[1].reason
    assert made[1].spec is None


# -- what cannot be quantized ---------------------------------------------------------------------------------------------


class Einsum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ij,jk->ik", a, b)


class Recurrent(nn.Module):
    """No front end looks into a bag of embeddings; a linear beside it is unaffected."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(8, 6), nn.Linear(6, 4)

    def forward(self, index: Tensor) -> Tensor:
        return self.out(self.bag(index))


class Positions(nn.Embedding):
    """Looks its rows up by itself, as Whisper's decoder does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[1 : 1 + x.shape[-2]]


INTEGERS = (torch.ones(4, 8, dtype=torch.int64), torch.ones(8, 3, dtype=torch.int64))
CONVOLUTION = nn.Sequential(nn.Conv1d(3, 4, 3))
SIGNAL = (randn(2, 3, 9),)
TABLE = (torch.tensor([0, 1]),)
REFUSED: dict[str, tuple[nn.Module, Any, tuple[Any, ...], str]] = {
    "einsum": (Einsum(), "hybrid", (randn(2, 3), randn(3, 4)), "einsum has no FP8 form; write it with matmul"),
    "embedding_bag": (Recurrent(), "hybrid", (torch.tensor([[0, 1]]),), "embedding_bag has no FP8 form"),
    "integers": (Call(torch.matmul), "hybrid", INTEGERS, "operands are int64, int64, not floating point"),
    "vector": (Call(torch.matmul), "hybrid", (randn(4, 8), randn(8)), "a product with a vector"),
    "max_norm": (seeded(Embedding, max_norm=1.0), "hybrid", TABLE, "an embedding with max_norm or sparse gradients"),
    "sparse": (nn.Sequential(nn.Embedding(8, 6, sparse=True)), "hybrid", TABLE, "an embedding with max_norm or sparse gradients"),
    "embedding without a role of its own": (
        nn.Sequential(nn.Embedding(8, 6)),
        {"extends": "hybrid", "defaults": {"weight": "none", "grad_output": "none"}},
        TABLE,
        "no role of this recipe applies here",
    ),
    "embedding in blocks": (
        nn.Sequential(nn.Embedding(8, 6)),
        {"extends": "hybrid", "defaults": {"weight": {"granularity": [1, 2]}}},
        TABLE,
        "an embedding has no block scales",
    ),
    "convolution by rows": (
        CONVOLUTION,
        {"extends": "hybrid", "defaults": {"input": ROW}},
        SIGNAL,
        "a convolution takes one scale per tensor only (granularity: tensor; of its weight also channel)",
    ),
    "experts by rows": (
        seeded(Experts),
        {"extends": "hybrid", "defaults": {"input": ROW}},
        tokens(),
        "a grouped_mm takes one scale per tensor only (granularity: tensor)",
    ),
    "groups along the contraction": (
        Call(lambda x, ends: torch._grouped_mm(x.t(), x, offs=ends)),
        "hybrid",
        (randn(16, 8).bfloat16(), torch.tensor([8, 16], dtype=torch.int32)),
        "a grouped_mm whose groups are not the rows of its first operand",
    ),
    "a table read by index": (
        nn.Sequential(Positions(8, 6), nn.Linear(6, 4)),
        "hybrid",
        (randn(3, 6),),
        "an embedding that indexes its table itself",
    ),
    "fused attention": (
        seeded(Attention),
        "hybrid",
        (randn(2, 4, 8),),
        "fused attention stays in high precision (attention: high_precision)",
    ),
    "no role applies": (
        nn.Sequential(nn.Linear(8, 6), nn.ReLU()),  # which reads the tensor of the only role in high precision
        {"extends": "hybrid", "defaults": {"input": "none", "weight": "none", "grad_output": "none", "output": {"format": "e4m3fn"}}},
        (randn(4, 8),),
        "no role of this recipe applies here",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_stays_in_high_precision_and_says_why(name: str) -> None:
    model, recipe, inputs, reason = REFUSED[name]
    trace = Trace(model, recipe, *inputs)
    rows = {row.reason: row for row in trace.plan.rows}
    assert rows[reason].decision == "high_precision"
    got, expected = trace.fast(*inputs), model(*inputs)
    if all(row.decision == "high_precision" for row in trace.plan.rows):
        assert torch.equal(got, expected)


def test_exempt_neighbours_are_left_alone() -> None:
    trace = together("feed gelu", {"extends": "direct", "exempt": ["up"]})
    assert {row.name: row.decision for row in trace.plan.rows} == {"up": "exempt", "down": "fp8"}
    ops = trace.ops("lower")
    assert ops["fp8fx.linear"] + ops["fp8fx.linear_quantize"] == 1
    assert ops["linear"] == 1


# -- outputs that the next operation reads in high precision ----------------------------------------------------------------


def outputs(trace: Trace) -> dict[str, bool]:
    """site -> does a role round its output?"""
    return {row.name: row.spec is not None and row.spec.output is not None for row in trace.plan.rows}


def test_output_fused_conv_into_batch_norm() -> None:
    trace = together("conv and norm", "direct")
    assert outputs(trace) == {"conv": False, "head": True}
    assert trace.plan["conv"].reason.endswith("output fused into batch_norm")


@pytest.mark.parametrize("act", ["gelu", "tanh gelu", "relu", "silu"])
def test_output_fused_linear_into_activation(act: str) -> None:
    trace = together(f"feed {act}", "direct")
    assert outputs(trace) == {"up": False, "down": True}
    assert "output fused into" in trace.plan["up"].reason


def test_output_fused_scores_into_softmax_through_scale_and_mask() -> None:
    trace = together("scores", "direct")
    assert outputs(trace) == {"matmul": False, "matmul_1": True}
    assert trace.plan["matmul"].reason.endswith("output fused into softmax")


class Branch(nn.Module):
    """An output that an activation and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return F.relu(h) + h.cos()


def test_output_not_fused_where_something_else_reads_it_too() -> None:
    trace = Trace(seeded(Branch), "direct", randn(3, 8))
    assert outputs(trace) == {"fc": True}


def test_output_fused_by_name() -> None:
    trace = Trace(seeded(Branch), "direct", randn(3, 8), output_fused=["fc"])
    assert outputs(trace) == {"fc": False}
    assert trace.plan["fc"].reason.endswith("output fused")
    assert trace.ops("insert_qdq")["fp8fx.dequantize"] == 0


# -- roles that an operation does not have ------------------------------------------------------------------------------------


def test_embedding_keeps_the_roles_it_has() -> None:
    trace = Trace(nn.Sequential(nn.Embedding(8, 6)), "direct", torch.tensor([[1, 2]]))
    spec = trace.plan["0"].spec
    assert spec is not None
    assert [role for role in ROLES if getattr(spec, role) is not None] == ["weight", "grad_output", "grad_weight"]


def test_a_product_of_activations_quantizes_both_as_inputs() -> None:
    recipe = {"extends": "hybrid", "defaults": {"weight": {"format": "e3m4fn"}}}
    trace = together("scores", recipe)
    for row in trace.plan.rows:
        assert row.spec is not None
        assert row.spec.weight == row.spec.input
    without = together("scores", {"extends": "hybrid", "defaults": {"input": "none"}})
    assert all(row.spec is not None and row.spec.weight is None for row in without.plan.rows)


def test_stochastic_input_is_saved_in_fp8() -> None:
    recipe = {"extends": "hybrid", "defaults": {"save_for_backward": "high_precision", "input": {"rounding": "stochastic"}}}
    spec = Trace(nn.Sequential(nn.Linear(8, 6)), recipe, randn(4, 8)).plan["0"].spec
    assert spec is not None
    assert spec.save_for_backward == "fp8"


# -- attention --------------------------------------------------------------------------------------------------------------


def test_attention_emulated_on_request() -> None:
    trace = together("attention", {"extends": "hybrid", "defaults": {"attention": "emulate"}})
    row = next(row for row in trace.plan.rows if row.op == "attention")
    assert row.decision == "fp8"
    assert row.spec is not None
    assert row.spec.weight is None
    assert row.spec.grad_weight is None


def test_conv_net_is_quantized_whole() -> None:
    trace = Trace(seeded(ConvNet), "hybrid", randn(2, 3, 6, 6))
    assert [row.decision for row in trace.plan.rows] == ["fp8", "fp8"]


# -- experts ----------------------------------------------------------------------------------------------------------------


def test_experts_are_one_site_named_after_their_weights() -> None:
    trace = Trace(seeded(Experts), "hybrid", *tokens())
    (row,) = trace.plan.rows
    assert (row.name, row.op, row.decision, row.shape, row.flops) == ("weights", "grouped_mm", "fp8", "6x16x8 in 3 groups", 2 * 6 * 16 * 8)


def test_a_grouped_product_without_offsets_is_a_bmm() -> None:
    a, b = randn(2, 8, 8).bfloat16(), randn(2, 8, 8).bfloat16()
    trace = Trace(Call(lambda a, b: torch._grouped_mm(a, b)), "hybrid", a, b)
    assert [(row.name, row.op, row.decision) for row in trace.plan.rows] == [("bmm", "bmm", "fp8")]


def test_torch_and_transformers_run_experts_alike() -> None:
    x, ends = tokens()
    kinds = (torch._grouped_mm, F.grouped_mm, grouped_mm_fallback(), grouped_mm_fallback().default)
    traces = [Trace(seeded(Experts, kind).bfloat16(), "hybrid", x.bfloat16(), ends) for kind in kinds]
    assert [row.op for trace in traces for row in trace.plan.rows] == ["grouped_mm"] * 4
    first, *others = (trace.fast(x.bfloat16(), ends) for trace in traces)
    assert all(torch.equal(first, other) for other in others)
