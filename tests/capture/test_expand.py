"""nn.MultiheadAttention written out: the captured graph computes what the module computes, and its products are sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn

LENGTH, BATCH, WIDTH, HEADS = 5, 3, 8, 2


class SelfAttention(nn.Module):
    def __init__(self, *, need_weights: bool = True, average: bool = True, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.call = {"need_weights": need_weights, "average_attn_weights": average, "is_causal": causal}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Any:
        y, weights = self.attn(x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, **self.call)
        return y if weights is None else (y, weights)


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attn(x, memory, memory, need_weights=False)[0]


def boolean(*shape: int) -> Tensor:
    """True is left out; the first key stays, so that no row is empty."""
    mask = randn(*shape, seed=5) > 0.5
    mask[..., 0] = False
    return mask


def causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(LENGTH)


MASKS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "bool": (boolean(LENGTH, LENGTH), None),
    "float": (randn(LENGTH, LENGTH, seed=6), None),
    "per head": (randn(BATCH * HEADS, LENGTH, LENGTH, seed=6), None),
    "key padding": (None, boolean(BATCH, LENGTH)),
    "float and key padding": (randn(LENGTH, LENGTH, seed=6), torch.zeros(BATCH, LENGTH).masked_fill(boolean(BATCH, LENGTH), -torch.inf)),
}


def assert_same_numbers(trace: Trace) -> None:
    module = trace.graph("capture")
    ours, theirs = module(*trace.values), trace.model(*trace.inputs)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    for a, b in zip([out for out in ours if out is not None], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention_with_masks(mask: str, need_weights: bool) -> None:
    trace = Trace(seeded(SelfAttention, need_weights=need_weights), "hybrid", randn(LENGTH, BATCH, WIDTH), *MASKS[mask])
    assert_same_numbers(trace)
    ops = [row.op for row in trace.plan.rows]
    assert ops == (["linear", "matmul", "matmul", "linear"] if need_weights else ["linear", "attention", "linear"])


@pytest.mark.parametrize(
    "options",
    [{"average": False}, {"bias": False}, {"batch_first": True}, {"batch_first": True, "need_weights": False}],
    ids=lambda options: ", ".join(options),
)
def test_options(options: dict[str, Any]) -> None:
    trace = Trace(seeded(SelfAttention, **options), "hybrid", randn(BATCH, LENGTH, WIDTH))
    assert_same_numbers(trace)
    assert trace.plan.fp8_flops_share == 1.0


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint(need_weights: bool) -> None:
    model = seeded(SelfAttention, need_weights=need_weights, causal=True)
    assert_same_numbers(Trace(model, "hybrid", randn(LENGTH, BATCH, WIDTH), causal()))


def test_dynamic_sizes() -> None:
    """Another length and batch: Dynamo captures again with symbolic sizes, which no node of the expansion names."""
    model = seeded(SelfAttention)
    trace = Trace(model, "none", randn(LENGTH, BATCH, WIDTH), None, boolean(BATCH, LENGTH), dynamic=None)
    for length, batch in ((7, 4), (9, 2)):
        inputs = randn(length, batch, WIDTH), None, boolean(batch, length)
        for ours, theirs in zip(trace.fast(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_names_are_those_of_the_parameters() -> None:
    trace = Trace(seeded(SelfAttention), "hybrid", randn(LENGTH, BATCH, WIDTH))
    assert [row.name for row in trace.plan.rows] == ["attn.in_proj_weight", "attn.matmul", "attn.matmul_1", "attn.out_proj"]


def test_separate_projections_are_expanded() -> None:
    trace = Trace(seeded(CrossAttention, kdim=6, vdim=6), "hybrid", randn(LENGTH, BATCH, WIDTH), randn(7, BATCH, 6, seed=2))
    assert_same_numbers(trace)
    assert [row.op for row in trace.plan.rows] == ["linear", "linear", "linear", "attention", "linear"]


@pytest.mark.filterwarnings("ignore:fp8fx. no layer runs in FP8")
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (seeded(CrossAttention), (randn(LENGTH, BATCH, WIDTH), randn(7, BATCH, WIDTH, seed=2))),
        (seeded(SelfAttention, need_weights=False), (randn(LENGTH, WIDTH),)),
        (seeded(SelfAttention, need_weights=False, add_bias_kv=True), (randn(LENGTH, BATCH, WIDTH),)),
        (seeded(SelfAttention, need_weights=False, add_zero_attn=True), (randn(LENGTH, BATCH, WIDTH),)),
    ],
    ids=["cross attention with a packed weight", "unbatched", "add_bias_kv", "add_zero_attn"],
)
def test_other_forms_stay_one_call_with_a_reason(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    trace = Trace(model, "hybrid", *inputs)
    (row,) = trace.plan.rows
    assert row.decision == "high_precision"
    assert row.reason == "this form of multi_head_attention_forward is not expanded"
    assert_same_numbers(trace)
