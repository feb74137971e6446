"""For *insert_qdq*, *fuse* and *lower*: which nodes are activations that the compound operators know, by the name those give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F


def activation_of(node: Any) -> str | None:
    """gelu, gelu_tanh, relu or silu, or None."""
    if not isinstance(node, fx.Node) or len(node.args) != 1:
        return None
    plain = not node.kwargs or (set(node.kwargs) <= {"inplace"} and node.kwargs.get("inplace") is False)
    if node.target is F.gelu:
        kind = node.kwargs.get("approximate", "none")
        return "gelu_tanh" if kind == "tanh" else "gelu"
    if node.target in (F.relu, torch.relu, "relu"):
        return "relu" if plain else None
    if node.target is F.silu:
        return "silu" if plain else None
    return None
