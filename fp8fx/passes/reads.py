"""For *cancel*, *fuse* and *lower*: who really reads a high-precision tensor? An anchor is passed for its gradient only."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp8fx.spec import GEMMS, SiteSpec

ops = torch.ops.fp8fx

# operator -> for each anchor argument, the argument that holds its codes
_CODES: dict[Any, dict[int, int]] = {
    ops.linear.default: {0: 3, 1: 4},
    ops.linear_quantize.default: {0: 3, 1: 4},
    ops.matmul.default: {0: 2, 1: 3},
    ops.grouped_mm.default: {0: 3, 1: 4},
    ops.conv.default: {0: 3, 1: 4},
    ops.mlp.default: {0: 5, 1: 6, 3: 7},
    ops.act_linear.default: {0: 5, 1: 6, 2: 7},
}
_BACKWARD_TEXT: dict[Any, int] = {
    ops.linear.default: 11,
    ops.linear_quantize.default: 11,
    ops.matmul.default: 10,
    ops.grouped_mm.default: 11,
    ops.conv.default: 17,
}


def reads_values(user: fx.Node, node: fx.Node) -> bool:
    """True unless `user` takes `node` as an anchor only."""
    if user.target in (ops.anchor.default, ops.dequantize.default):
        return any(arg is node for arg in user.args[1:])
    codes = _CODES.get(user.target)
    if codes is None:
        return True
    places = [i for i, arg in enumerate(user.args) if arg is node]
    if not places or any(i not in codes for i in places):
        return True
    return any(not user.args[codes[i]] or _wants_values(user, i) for i in places)


def _wants_values(user: fx.Node, place: int) -> bool:
    """A GEMM in high precision multiplies the anchor itself, and so may a backward that saves it."""
    index = _BACKWARD_TEXT.get(user.target)
    if index is None:
        return False  # mlp is only made of sites that read codes
    spec = SiteSpec.parse_backward(str(user.args[index]))
    return set(spec.gemms) != set(GEMMS) or spec.save_for_backward != "fp8"


def read_only_as_anchor(node: fx.Node, but: Any = ()) -> bool:
    """Every user except those in `but` takes `node` as an anchor."""
    return all(not reads_values(user, node) for user in node.users if user not in but)
