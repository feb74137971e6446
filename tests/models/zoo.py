"""The models that fp8fx must handle as they are: built small, with random weights, an input and a loss each."""

from __future__ import annotations

import dataclasses

import torch
from models import of_timm, of_transformers
from models.case import Case, Entry

__all__ = ["ZOO", "Case", "Entry", "build"]

ZOO: dict[str, Entry] = {**of_timm.MODELS, **of_transformers.MODELS}


def build(name: str, seed: int = 0) -> Case:
    """The case `name` with weights and inputs from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dataclasses.replace(ZOO[name].build(), name=name)
