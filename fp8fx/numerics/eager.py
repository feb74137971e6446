"""When the eager CPU shortcuts may be used. They give the same bits as the traceable forms, faster without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def tracing() -> bool:
    """True under Dynamo and under every dispatch mode (fake tensors, make_fx, counters): they get the traceable form."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def plain_cpu(x: Tensor) -> bool:
    """True for a real CPU tensor outside every tracer."""
    return not tracing() and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
