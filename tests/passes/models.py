"""Models of one operation each, with inputs; and small ones in which operations meet."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from passes.trace import Trace, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]


class Call(nn.Module):
    """`function(*parameters, *inputs)` with learned parameters of the given shapes, so that every operand has a gradient."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*self.parts, *inputs)


class TransposedLinear(nn.Module):
    """Hugging Face's Conv1D: a linear with its weight as [in, out], through addmm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Embedding(nn.Module):
    """The function itself, with options that nn.Embedding writes in another form."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.options = nn.Parameter(torch.randn(8, 6)), options

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.table, **self.options)


def grouped_mm_fallback() -> Any:
    """The operator that transformers registers when its experts are imported."""
    importlib.import_module("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback


class Experts(nn.Module):
    """Tokens sorted by expert, each expert a linear of its own: weights as [experts, out, in].

    `product`: by default the operator of transformers, since torch's own is compiled for bfloat16 only.
    """

    def __init__(self, product: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 16, 8))
        self.product = grouped_mm_fallback() if product is None else product

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.product(x, self.weights.transpose(-2, -1), offs=ends)


class Shared(nn.Module):
    """Three linears that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


class Chain(nn.Module):
    """Two linears, with nothing but a change of shape between."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(8, 8), nn.Linear(8, 8), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


class Feed(nn.Module):
    """norm -> linear -> activation -> linear."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.act = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class Scores(nn.Module):
    """scores -> scale, mask -> softmax -> mix."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) / 4 + mask
        return F.softmax(scores.masked_fill(mask < -1, -1e4), dim=-1) @ v


class Attention(nn.Module):
    """Fused attention between linears."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(8, 24), nn.Linear(8, 8), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(-3, -2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(-3, -2).flatten(-2))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))


def _module(kind: Any, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: seeded(kind, *args, **kwargs)


def _inside(kind: Any, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """One layer inside a model, so that it has a name: '0'."""
    return lambda: nn.Sequential(seeded(kind, *args, **kwargs))


def _inputs(*shapes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(randn(*shape, seed=i + 1) for i, shape in enumerate(shapes))


def index() -> tuple[Tensor]:
    return (torch.tensor([[0, 3, 3], [7, 1, 3]]),)


def tokens(*ends: int) -> tuple[Any, ...]:
    """Six tokens of width 8, and where each of three experts' share ends."""
    return randn(6, 8), torch.tensor(ends or (2, 3, 6), dtype=torch.int32)


def _layer(kind: Any, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Case:
    return _inside(kind, *args, **kwargs), _inputs(shape)


def _call(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], *inputs: tuple[int, ...]) -> Case:
    return _module(Call, function, *shapes), _inputs(*inputs)


# name -> (model, inputs): one site each.
SINGLE: dict[str, Case] = {
    "linear": _layer(nn.Linear, (3, 4, 8), 8, 6),
    "linear without bias": _layer(nn.Linear, (5, 8), 8, 6, bias=False),
    "linear of a vector": _layer(nn.Linear, (8,), 8, 6),
    "matmul": _call(torch.matmul, [(4, 8)], (8, 6)),
    "matmul, broadcast": _call(torch.matmul, [(2, 1, 4, 8)], (3, 8, 6)),
    "matmul, two operands with gradients": _call(lambda a, b: a @ b, [(2, 4, 8), (8, 6)]),
    "mm": _call(torch.mm, [(4, 8)], (8, 6)),
    "bmm": _call(torch.bmm, [(2, 4, 8), (2, 8, 6)]),
    "grouped_mm": (_module(Experts), tokens),
    "grouped_mm, experts without tokens": (_module(Experts), lambda: tokens(0, 0, 6)),
    "addmm with a weight": (_inside(TransposedLinear, 8, 6), _inputs((2, 3, 8))),
    "addmm": _call(lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2.0), [(4, 8), (8, 6)], (4, 6)),
    "addmm, beta only": _call(lambda a, b, c: torch.addmm(c, a, b, beta=3), [(4, 8), (8, 6)], (4, 6)),
    "addmm with a vector": _call(lambda c, a, b: torch.addmm(c, a, b, alpha=2.0), [(6,), (4, 8)], (8, 6)),
    "baddbmm": _call(lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=2.0), [(2, 4, 8), (2, 8, 6)], (2, 4, 6)),
    "conv1d": _layer(nn.Conv1d, (2, 3, 9), 3, 4, 3, stride=2, padding=1),
    "conv1d, unbatched": _layer(nn.Conv1d, (3, 9), 3, 4, 3),
    "conv1d, same, even kernel": _layer(nn.Conv1d, (2, 3, 9), 3, 4, 4, padding="same"),
    "conv1d, same, dilated": _layer(nn.Conv1d, (2, 3, 9), 3, 4, 2, padding="same", dilation=3),
    "conv2d": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv2d, groups": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 6, 3, groups=2, bias=False),
    "conv2d, depthwise": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 4, 3, groups=4, padding=1),
    "conv2d, valid": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 6, 3, padding="valid"),
    "conv2d, same, one side even": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 6, (4, 3), padding="same"),
    "conv2d, circular": _layer(nn.Conv2d, (2, 4, 7, 6), 4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d, unbatched": _layer(nn.Conv2d, (4, 7, 6), 4, 6, 3),
    "conv3d": _layer(nn.Conv3d, (1, 2, 5, 4, 6), 2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1),
    "conv3d, same, even kernel": _layer(nn.Conv3d, (1, 2, 5, 4, 6), 2, 3, 2, padding="same"),
    "conv_transpose1d": _layer(nn.ConvTranspose1d, (2, 3, 5), 3, 4, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose1d, unbatched": _layer(nn.ConvTranspose1d, (3, 5), 3, 4, 3),
    "conv_transpose2d": _layer(nn.ConvTranspose2d, (2, 4, 4, 5), 4, 6, 3, stride=2, groups=2, dilation=(1, 2)),
    "conv_transpose3d": _layer(nn.ConvTranspose3d, (1, 2, 3, 2, 3), 2, 3, 2, bias=False),
    "embedding": (_inside(nn.Embedding, 8, 6), index),
    "embedding, padding_idx": (_inside(nn.Embedding, 8, 6, padding_idx=3), index),
    "embedding, negative padding_idx": (_inside(Embedding, padding_idx=-5), index),
    "embedding, padding_idx -1": (_inside(Embedding, padding_idx=-1), index),
    "embedding, scale_grad_by_freq": (_inside(nn.Embedding, 8, 6, scale_grad_by_freq=True), index),
}


# name -> (model, inputs): several sites, and what the passes do between them.
class Gated(nn.Module):
    """SwiGLU and the like: norm -> gate, up -> down, with a residual."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.activation(self.gate(h)) * self.up(h))


TOGETHER: dict[str, Case] = {
    "shared": (_module(Shared), _inputs((3, 8))),
    "chain": (_module(Chain), _inputs((3, 8))),
    "chain through shapes": (_module(Chain, lambda h: h.view(2, 2, 8).transpose(0, 1).reshape(4, 8)), _inputs((4, 8))),
    "chain read twice": (_module(Chain, lambda h: h + h.sum()), _inputs((3, 8))),
    "feed gelu": (_module(Feed), _inputs((2, 3, 8))),
    "feed tanh gelu": (_module(Feed, lambda h: F.gelu(h, approximate="tanh")), _inputs((3, 8))),
    "feed relu": (_module(Feed, F.relu), _inputs((3, 8))),
    "feed silu": (_module(Feed, F.silu), _inputs((3, 8))),
    "gated silu": (_module(Gated, F.silu), _inputs((2, 3, 8))),
    "gated gelu": (_module(Gated, F.gelu), _inputs((3, 8))),
    "scores": (_module(Scores), _inputs((2, 4, 8), (2, 4, 8), (2, 4, 8), (4, 4))),
    "attention": (_module(Attention), _inputs((2, 4, 8))),
    "conv and norm": (_module(ConvNet), _inputs((2, 3, 6, 6))),
}


def together(name: str, recipe: Any) -> Trace:
    """A model of TOGETHER under `recipe`; those under a shipped recipe are captured once for all tests, which only look at them."""
    return _captured(name, recipe) if isinstance(recipe, str) else _trace(name, recipe)


def _trace(name: str, recipe: Any) -> Trace:
    make, inputs = TOGETHER[name]
    return Trace(make(), recipe, *inputs())


_captured = functools.cache(_trace)
