"""Every operator: torch's own checks of schema, fake and autograd registration."""

from __future__ import annotations

import pytest
import torch
from ops.samples import SAMPLES, ops

from fp8fx.ops.library import REFERENCES


def test_every_operator_has_a_sample() -> None:
    assert SAMPLES.keys() == REFERENCES.keys()


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))])
def test_opcheck(name: str, index: int) -> None:
    torch.library.opcheck(getattr(ops, name).default, SAMPLES[name][index]())
