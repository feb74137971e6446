"""Two streams at a time: partial results, and scales made on the way, belong to a call. Casts and products are in files of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fp8fx.kernels.activation_amax import activation_amax, activation_backward_amax
from fp8fx.kernels.activation_cast import activation_backward_cast, activation_cast
from fp8fx.kernels.activation_keep import activation_keep
from fp8fx.kernels.activations import Kept
from fp8fx.kernels.add_norm import add_norm_cast
from fp8fx.kernels.cast import cast_current
from fp8fx.kernels.cast_block import cast_block
from fp8fx.kernels.norm_backward import norm_backward_cast
from fp8fx.kernels.norm_cast import norm_cast
from fp8fx.kernels.round_values import round_values
from fp8fx.kernels.scaled_mm import scaled_mm
from fp8fx.kernels.scaled_mm_configs import CONFIGS

M, K = 1024, 2048


def made(x: Tensor) -> Tensor:
    """Room for a scale and its amax."""
    return x.new_zeros(2, dtype=torch.float32)


def norms(x: Tensor, kind: str) -> Any:
    scale, record = made(x), x.new_zeros(3, dtype=torch.float32)
    bias = x[1] if kind == "layer" else None
    return norm_cast(x, x[0], bias, "e4m3fn", kind, current=True, made_scale=scale, record=record, counts=True), scale, record


def added(x: Tensor) -> Any:
    scale = made(x)
    return add_norm_cast(x, x.flip(0), x[0], x[1], "e4m3fn", "layer", current=True, made_scale=scale), scale


def norm_backward(x: Tensor) -> Any:
    _, mean, rstd = norm_cast(x, None, None, "e4m3fn", "layer")
    grads = {name: x.new_zeros(K, dtype=torch.float32) for name in ("weight_grad", "bias_grad", "row_sum")}
    scale = made(x)
    return norm_backward_cast(x.flip(0), x, x[0], mean, rstd, "e5m2", current=True, made_scale=scale, write=True, **grads), scale, grads


def swiglu(x: Tensor) -> Any:
    scale, kept = made(x), (Kept.empty(x), Kept.empty(x))
    amax = activation_amax(x, x.flip(0), "silu")
    pair = activation_cast(x, x.flip(0), "silu", "e4m3fn", amax, from_amax=True, made_scale=scale, kept=kept)
    return pair, scale, kept


def swiglu_backward(x: Tensor) -> Any:
    scales, sums = (made(x), made(x)), x.new_zeros(2, K, dtype=torch.float32)
    h, u = x.flip(0), x.flip(1)
    amaxes = activation_backward_amax(x, h, u, "silu")
    into = {"made_scale": scales[0], "made_scale_u": scales[1], "bias_grad": sums[0], "bias_grad_u": sums[1]}
    return activation_backward_cast(x, h, u, "silu", "e5m2", *amaxes, from_amax=True, **into), scales, sums


def in_place(x: Tensor) -> Any:
    h, kept = x.clone(), (Kept.empty(x), None)
    return activation_keep(h, None, "gelu", kept), h, kept


def product(x: Tensor, blocked: bool) -> Tensor:
    a, b, one = x.to(torch.float8_e4m3fn), x.flip(0).to(torch.float8_e5m2).t(), torch.ones((), device=x.device)
    if not blocked:
        return scaled_mm(a, b, one, one, accumulate="precise", config=CONFIGS["specialized"])
    scales = x[:, : K // 128].float().abs(), x[: K // 128, : M // 128].float().abs()
    return scaled_mm(a, b, *scales, block_a=(1, 128), block_b=(128, 128), config=CONFIGS["specialized_blocked"])


WORK: dict[str, Callable[[Tensor], Any]] = {
    "layer norm": lambda x: norms(x, "layer"),
    "rms norm": lambda x: norms(x, "rms"),
    "add norm": added,
    "norm backward": norm_backward,
    "swiglu": swiglu,
    "swiglu backward": swiglu_backward,
    "activation in place": in_place,
    "cast block": lambda x: cast_block(x, "e4m3fn", layout="both", power_of_two=True),
    "cast block, two reads": lambda x: cast_block(x, "e5m2", layout="both"),
    "cast rows": lambda x: cast_current(x, "e4m3fn", "row"),
    "round values": lambda x: round_values(x, "e5m2", current=True),
    "specialized product": lambda x: product(x, blocked=False),
    "specialized product of blocks": lambda x: product(x, blocked=True),
}


def tensors(result: Any) -> Iterator[Tensor]:
    """All of a result, at any depth."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from tensors(tuple(result.values()))
    elif result is not None:
        for each in result:
            yield from tensors(each)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", WORK)
def test_two_streams(name: str) -> None:
    """Queued behind a pause, so that both streams have work at once; the same bits as one after the other."""
    xs = [(torch.randn(M, K, device="cuda") * 2.0 ** (i - 4)).bfloat16() for i in range(8)]
    expected = [[part.clone() for part in tensors(WORK[name](x))] for x in xs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # cycles: 10 ms
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 2]):
            results.append(WORK[name](x))
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        found = list(tensors(result))
        assert len(found) == len(wanted) > 0
        assert all(same_bits(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert not same_bits(expected[0][0], expected[1][0])
