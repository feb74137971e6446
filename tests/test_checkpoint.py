"""Activation checkpointing, both forms: the same layers in FP8, the same numbers, less saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate.models import Stack
from gate.stages import assert_same_bits, run_stages
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8fx


class Checkpointed(Stack):
    """`Stack` whose blocks are recomputed in backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


class Reentrant(Checkpointed):
    reentrant = True


class Nested(Checkpointed):
    """A checkpointed part inside another."""

    def forward(self, x: Tensor) -> Tensor:
        def both(x: Tensor) -> Tensor:
            return self.blocks[1](checkpoint(self.blocks[0], x, use_reentrant=False))

        return self.out(checkpoint(both, self.inp(x), use_reentrant=False))


def make(cls: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["hybrid", "direct", "emulation-direct"])
@pytest.mark.parametrize("cls", [Checkpointed, Reentrant, Nested])
def test_same_numbers_as_without(cls: Any, recipe: str) -> None:
    x = torch.randn(3, 5, 8)
    plain, recomputed = fp8fx.compile(make(Stack), recipe), fp8fx.compile(make(cls), recipe)
    expected, got = gradients(plain, x), gradients(recomputed, x)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [row.name for row in recomputed.plan().rows] == [row.name for row in plain.plan().rows]  # type: ignore[operator]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_under_inner_compilers(inner: str) -> None:
    x = torch.randn(3, 5, 8)
    expected = gradients(fp8fx.compile(make(Checkpointed), "hybrid"), x)
    got = gradients(fp8fx.compile(make(Checkpointed), "hybrid", inner=inner), x)
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= 0.05 * grad.norm() + 1e-6, name


def test_same_bits_after_every_pass() -> None:
    assert_same_bits(run_stages(make(Checkpointed), "hybrid", (torch.randn(3, 5, 8),)))


def test_saves_less() -> None:
    def saved(model: nn.Module) -> int:
        sizes: list[int] = []
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own:
                sizes.append(t.numel() * t.element_size())
            return t

        fast = fp8fx.compile(model, "hybrid")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fast(torch.randn(8, 64, 8))
        return sum(sizes)

    assert saved(make(Checkpointed)) < 0.5 * saved(make(Stack))


def test_layer_call_count_is_that_of_forward() -> None:
    fast = fp8fx.compile(make(Checkpointed), "hybrid")
    fast(torch.randn(3, 5, 8)).sum().backward()
    assert {row.calls for row in fast.plan().rows} == {1}  # type: ignore[operator]
