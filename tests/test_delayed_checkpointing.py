"""Delayed scaling under activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from delayed_net import EVERY_ROLE, Net, assert_equal_state, batch, net, train
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fp8fx


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_changes_nothing(reentrant: bool) -> None:
    """The scales of a step are those of its first forward, also in the recomputation, also where that alone has gradients."""
    models = [net(), net()]
    fasts = [fp8fx.compile(model, "delayed") for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for step in range(4):
        index = batch(step)
        ones = [torch.ones(1, requires_grad=True) for _ in models]  # the reentrant form wants an input with a gradient
        plain = fasts[0](index) * ones[0]
        saved = checkpoint(lambda one, index=index: fasts[1](index) * one, ones[1], use_reentrant=reentrant)
        assert torch.equal(plain, saved)
        for y, optimizer in ((plain, optimizers[0]), (saved, optimizers[1])):
            F.cross_entropy(y.flatten(0, 1), index.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_measure_and_round_as_plain_ones(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, index: Tensor) -> Tensor:
            x = checkpoint(self.block, self.embed(index), use_reentrant=reentrant)
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
            return self.head(checkpoint(self.block, x, use_reentrant=reentrant))

    model = net()
    torch.manual_seed(0)
    saving = Checkpointed()
    fasts = [fp8fx.compile(m, EVERY_ROLE) for m in (model, saving)]
    for fast in fasts:
        train(fast, 3)
    for mine, other in zip(model.parameters(), saving.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert_equal_state(*fasts)
