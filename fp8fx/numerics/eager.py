"""When the eager CPU shortcuts may be used, and what may be asked of a GPU. They give the same bits as the other forms, faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tracing() -> bool:
    """True under Dynamo and under every dispatch mode (fake tensors, make_fx, counters): they get the traceable form."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def plain_cpu(x: Tensor) -> bool:
    """True for a real CPU tensor outside every tracer."""
    return not tracing() and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured. Then the host can ask the device nothing and copy nothing to it, and memory that is allocated is
    the graph's, which writes it anew whenever it is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


CHUNK = 16384  # elements: a dozen float32 temporaries of it fit a core's L2 cache, and each operator runs on one thread


def in_chunks(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    """`function(*tensors)` for an elementwise function of tensors of one shape, piece by piece, into a tensor of `dtype`.

    A chain of elementwise operators over a large tensor passes through memory once per operator; over a piece, through the cache.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    out = torch.empty(tensors[0].shape, dtype=dtype, device="cpu")
    target = out.view(-1)
    for start in range(0, target.numel(), CHUNK):
        target[start : start + CHUNK] = function(*(tensor[start : start + CHUNK] for tensor in flat))
    return out
