"""Stochastic rounding of products and sums: the bits by position, the steps by gfloat, no bias, one seed one result."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
from numerics.golden_stochastic import philox
from numerics.oracles import gfloat_format
from torch import Tensor, nn

import fp8fx
from fp8fx.arithmetic import Arithmetic, linear, matmul, number
from fp8fx.arithmetic import product as products
from fp8fx.arithmetic.definition import round_number
from fp8fx.arithmetic.numbers import rounder
from fp8fx.arithmetic.stream import Stream
from fp8fx.errors import ModelError

MASK = 0xFFFFFFFF
PRODUCTS, SUMS, OUTER, OUTPUT = range(4)
SIGMAS = 5.0


def key_of(seed: int, site: str, role: str, part: int = 0, step: int = 0, call: int = 0) -> list[int]:
    hashed = int.from_bytes(hashlib.blake2s(f"{site}\0arithmetic {role}".encode(), digest_size=4).digest(), "little")
    return philox([part, step, call, 0], [seed & MASK, (seed >> 32) ^ hashed])[:2]


def words(key: list[int], shape: tuple[int, int], k: int, what: int, row: int = 0) -> np.ndarray[Any, Any]:
    m, n = shape
    return np.array([[philox([j >> 2, i, k, what], key)[j & 3] for j in range(n)] for i in range(row, row + m)], dtype=np.int64)


def test_the_philox_of_this_test_is_philox() -> None:
    """Known answers of Random123."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([MASK] * 4, [MASK] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_words_are_of_a_position_and_not_of_a_tile() -> None:
    seed = (5 << 40) + 77
    stream = Stream.of(seed, "layers.0.fc", "grad_input", part=3, step=MASK, call=9)
    key = key_of(seed, "layers.0.fc", "grad_input", 3, MASK, 9)
    assert list(stream.key) == key
    whole = stream.words((6, 11), 70, SUMS, torch.device("cpu"))
    assert whole.tolist() == words(key, (6, 11), 70, SUMS).tolist()
    for row, column, m, n in ((2, 5, 3, 6), (0, 4, 1, 1), (5, 3, 1, 2)):
        part = stream.at(row, column).words((m, n), 70, SUMS, torch.device("cpu"))
        assert torch.equal(part, whole[row : row + m, column : column + n])
    seeds = torch.tensor([seed, MASK, 9])
    assert [int(word) for word in Stream.of(seeds[0], "layers.0.fc", "grad_input", 3, seeds[1], seeds[2]).key] == key


def rounded(x: np.ndarray[Any, Any], name: str, bits: np.ndarray[Any, Any], saturate: bool) -> np.ndarray[Any, Any]:
    """gfloat's stochastic rounding of float64."""
    if name == "float32":
        return x
    return gfloat.round_ndarray(gfloat_format(number(name)), x, gfloat.RoundMode.StochasticFastest, saturate, bits, 32)


def by_gfloat(a: Tensor, b: Tensor, arithmetic: Arithmetic, key: list[int], row: int = 0) -> Tensor:
    """Step by step in float64, each product and sum rounded to float32 first, then by gfloat."""
    left, right, shape = a.double().numpy(), b.double().numpy(), (a.shape[0], b.shape[1])
    saturate = arithmetic.overflow == "saturate"

    def q(x: np.ndarray[Any, Any], name: str, k: int, what: int) -> np.ndarray[Any, Any]:
        return rounded(x.astype(np.float32).astype(np.float64), name, words(key, shape, k, what, row), saturate)

    depth = a.shape[1]
    chunk = arithmetic.chunk or depth
    total = np.zeros(shape)
    for start in range(0, depth, chunk):
        acc = np.zeros(shape)
        for k in range(start, min(start + chunk, depth)):
            product = q(left[:, k : k + 1] * right[k] * 2.0**arithmetic.shift, arithmetic.products, k, PRODUCTS)
            acc = q(acc + product, arithmetic.accumulate, k, SUMS)
        total = q(total + acc, arithmetic.outer, start, OUTER) if arithmetic.chunk else acc
    return torch.from_numpy(q(total, arithmetic.output, 0, OUTPUT) * 2.0**-arithmetic.shift).float()


def on_grid(*shape: int) -> Tensor:
    return (torch.randn(shape) * 3).to(torch.float8_e4m3fn).float()


TEXTS = [
    "products=e4m3fn/rounding=stochastic/overflow=saturate",
    "products=e5m2/output=e5m2/rounding=stochastic",
    "accumulate=float16/rounding=stochastic/shift=-4",
    "products=e5m6/accumulate=bfloat16/chunk=5/outer=e6m9/output=float16/rounding=stochastic",
    "accumulate=e8m13/rounding=stochastic",
]


@pytest.mark.parametrize("text", TEXTS)
def test_steps_are_those_of_gfloat(text: str) -> None:
    torch.manual_seed(0)
    a, b, seed = on_grid(3, 17), on_grid(17, 6), (1 << 50) + 3
    y = matmul(a, b, text, seed=seed)
    expected = by_gfloat(a, b, Arithmetic.parse(text), key_of(seed, "arithmetic.matmul", "output"))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text", ["output=e4m3fn/overflow=saturate", "multiplier=mitchell/output=e5m2", "accumulate=hopper_fast/output=e5m2"]
)
def test_other_forms_round_what_they_round(text: str) -> None:
    """Only the output here: what comes before it is that of the same arithmetic without it."""
    torch.manual_seed(0)
    a, b = on_grid(2, 5, 16), on_grid(2, 16, 6)
    arithmetic = Arithmetic.parse(f"{text}/rounding=stochastic")
    plain = matmul(a, b, "/".join(part for part in text.split("/") if not part.startswith(("output", "overflow"))) or "exact")
    bits = words(key_of(8, "arithmetic.matmul", "output"), (10, 6), 0, OUTPUT)
    expected = rounded(plain.reshape(10, 6).double().numpy(), arithmetic.output, bits, arithmetic.overflow == "saturate")
    assert torch.equal(matmul(a, b, arithmetic, seed=8).reshape(10, 6), torch.from_numpy(expected).float())


@pytest.mark.parametrize("name", ["float16", "bfloat16", "e8m13", "e5m6", "e4m3fn", "e8m1"])
@pytest.mark.parametrize("overflow", ["saturate", "nonfinite"])
def test_rounding_is_the_definition(name: str, overflow: str) -> None:
    """Also of subnormals, at the end of the range, and of words just below and at the one that carries."""
    f, gen = number(name), torch.Generator().manual_seed(2)
    exponents = torch.randint(f.emin - f.mantissa_bits - 3, f.bias + 1, (300,), generator=gen).double()
    x = (torch.rand(300, generator=gen, dtype=torch.float64) + 1) * 2.0**exponents
    x = torch.cat([x, torch.tensor([f.max, f.max * (1 + 2.0**-12), 0.0], dtype=torch.float64)]).float()
    x = torch.cat([x, -x])
    bits = torch.randint(0, 2**32, x.shape, generator=gen)
    bits[::4], bits[1::4] = MASK, 0
    got = rounder(f, "stochastic", overflow)(x, lambda: bits)
    pairs = zip(x.tolist(), bits.tolist(), strict=True)
    exact = [round_number(Fraction(v) if math.isfinite(v) else v, f, "stochastic", overflow, word) for v, word in pairs]
    torch.testing.assert_close(got, torch.tensor([float(v) for v in exact]), rtol=0, atol=0, equal_nan=True)
    special = torch.tensor([math.inf, -math.inf, math.nan])
    kept = rounder(f, "stochastic", overflow)(special, lambda: torch.full((3,), MASK))
    edge = f.max if overflow == "saturate" else math.inf if f.has_inf else math.nan
    torch.testing.assert_close(kept, torch.tensor([edge, -edge, math.nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("text", ["products=e4m3fn", "products=e5m6/accumulate=float16/chunk=7/outer=bfloat16"])
def test_tiles_do_not_change_the_bits(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b, text = on_grid(13, 9), on_grid(9, 14), f"{text}/rounding=stochastic"
    whole = matmul(a, b, text, seed=1)
    monkeypatch.setattr(products, "DRAWN_ROWS", 5)
    monkeypatch.setattr(products, "COLUMNS", 6)
    assert torch.equal(matmul(a, b, text, seed=1), whole)
    assert torch.equal(matmul(a, b, text, seed=1, compiled=True), whole)
    assert torch.equal(matmul(a[:, None], b.expand(13, 9, 14), text, seed=1)[:, 0], whole)  # rows count on through a batch


def test_one_seed_one_result() -> None:
    torch.manual_seed(0)
    a, b, text = on_grid(4, 16), on_grid(16, 8), "products=e4m3fn/rounding=stochastic"
    y = matmul(a, b, text, seed=3)
    assert torch.equal(y, matmul(a, b, text, seed=3))
    assert torch.equal(matmul(a, b, text), matmul(a, b, text, seed=0))
    assert not torch.equal(y, matmul(a, b, text, seed=4))
    assert not torch.equal(y, matmul(a, b, text, seed=3 + 2**40))
    assert torch.equal(matmul(a, b, text, seed=2**64 - 1), matmul(a, b, text, seed=-1))
    assert torch.equal(linear(a, b.mT, None, text, seed=3), y)
    run = torch.compile(lambda a, b, s: matmul(a, b, text, seed=s), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(run(a, b, s), matmul(a, b, text, seed=s)) for s in (1, 2, 3))
    for wrong in (1.5, True, 2**64, None):
        with pytest.raises(ModelError, match=r"seed: got .*allowed: a whole number of up to 64 bits"):
            matmul(a, b, text, seed=wrong)  # type: ignore[arg-type]


def deviations(text: str, a: Tensor, b: Tensor, seeds: int) -> Tensor:
    """float64 [seeds, M, N], from the exact product."""
    exact = a.double() @ b.double()
    return torch.stack([matmul(a, b, text, seed=seed).double() - exact for seed in range(seeds)])


def test_products_are_unbiased() -> None:
    """y - exact is a sum over k of independent errors: step with probability r, else 0, less r step. So its variance is that of
    sum r (1 - r) step^2, and the mean of S n of them lies within 5 of its own standard deviations of zero. Rounding to nearest does not.
    Bits are 32, which moves a probability by less than 2^-32."""
    torch.manual_seed(0)
    a, b, seeds = on_grid(8, 32).abs(), on_grid(32, 16).abs(), 64
    step = 2.0 ** (torch.frexp(a[:, :, None] * b)[1] - 4).double().clamp(min=-9.0)  # of e4m3fn, [M, K, N]
    exact = a.double()[:, :, None] * b.double()
    assert float(exact.max()) < 448.0, "nothing saturates"
    r = (exact / step).frac()
    variance = (r * (1 - r) * step.square()).sum(1)
    assert float(variance.min()) > 0.0
    found = deviations("products=e4m3fn/rounding=stochastic", a, b, seeds)
    bound = SIGMAS * float((variance.sum() / seeds).sqrt()) / variance.numel()
    assert abs(float(found.mean())) < bound
    nearest = matmul(a, b, "products=e4m3fn").double() - a.double() @ b.double()
    assert abs(float(nearest.mean())) > bound
    scaled = found.square().mean(0) / variance
    assert float(scaled.mean()) == pytest.approx(1.0, abs=SIGMAS * math.sqrt(3.0 / (seeds * variance.numel())))


def test_sums_are_unbiased() -> None:
    """A sum is a martingale: each step's error has mean 0 whatever came before, and a variance of at most step^2 / 4, where the step is at
    most 2^-3 of the sum s in three mantissa bits, and E[s^2] = mean^2 + variance. So V_k <= V_(k-1) + (mean_k^2 + V_(k-1)) / 256."""
    depth, addend, seeds = 100, 0.3125, 24
    a, b, variance = torch.ones(16, depth), torch.full((depth, 32), addend), 0.0
    for k in range(1, depth + 1):
        variance += ((k * addend) ** 2 + variance) / 256
    found = deviations("accumulate=e5m3/rounding=stochastic", a, b, seeds)
    bound = SIGMAS * math.sqrt(variance / found.numel())
    assert bound < 0.05 * depth * addend
    assert abs(float(found.mean())) < bound
    assert float(found.square().mean()) < 2 * variance
    nearest = matmul(a, b, "accumulate=e5m3") - depth * addend
    assert float(nearest.max()) < -0.5 * depth * addend  # an addend below half a step is lost every time


def test_gradients() -> None:
    """`exact` leaves them alone; `same` draws other words for each."""
    torch.manual_seed(0)
    a, b, grad = on_grid(3, 6).requires_grad_(), on_grid(6, 5).requires_grad_(), on_grid(3, 5)
    text = "products=e5m2/rounding=stochastic"
    matmul(a, b, text, seed=2).backward(grad)
    torch.testing.assert_close(a.grad, grad @ b.detach().mT)
    a.grad = b.grad = None
    matmul(a, b, f"{text}/gradients=same", seed=2).backward(grad)
    arithmetic = Arithmetic.parse(text)
    assert torch.equal(a.grad, by_gfloat(grad, b.detach().mT, arithmetic, key_of(2, "arithmetic.matmul", "grad_a")))  # type: ignore[arg-type]
    assert torch.equal(b.grad, by_gfloat(a.detach().mT, grad, arithmetic, key_of(2, "arithmetic.matmul", "grad_b")))  # type: ignore[arg-type]


def recipe(**keys: Any) -> dict[str, Any]:
    off = {role: {"format": "e4m3fn", "scaling": "none"} for role in ("input", "weight", "grad_output")}
    return {"extends": "hybrid", "seed": 11, "defaults": {**off, "arithmetic": {"rounding": "stochastic", **keys}}}


def test_a_recipe_takes_its_bits_from_the_rng_input() -> None:
    """Seed of the recipe, step and call of the graph, name of the layer, role of the product: forward and both gradients."""
    torch.manual_seed(0)
    fast = fp8fx.compile(nn.Sequential(nn.Linear(16, 5, bias=False)), recipe(products="e5m2", gradients="same"))
    x, grad = on_grid(3, 16).requires_grad_(), on_grid(3, 5)
    w = fast[0].weight.detach().to(torch.float8_e4m3fn).float()
    arithmetic = Arithmetic.parse("products=e5m2/rounding=stochastic")
    got = []
    for call in (0, 1):
        x.grad = fast[0].weight.grad = None
        y = fast(x)
        y.backward(grad)
        for role, a, b, ours in (
            ("output", x.detach(), w.mT, y.detach()),
            ("grad_input", grad, w, x.grad),
            ("grad_weight", grad.mT, x.detach(), fast[0].weight.grad),
        ):
            assert torch.equal(ours, by_gfloat(a, b, arithmetic, key_of(11, "0", role, call=call))), role
        got.append(y.detach())
    assert not torch.equal(*got)
    assert "fp8_rng" in fp8fx.listing(fast.graph("insert_qdq"))


def test_every_product_of_a_call_has_words_of_its_own() -> None:
    """Blocks of K, groups and images of a convolution are products one after the other."""
    torch.manual_seed(0)
    block = {"format": "e4m3fn", "granularity": {"group": 8}}
    fast = fp8fx.compile(
        nn.Linear(16, 4, bias=False), recipe(products="e5m2") | {"defaults": {**recipe(products="e5m2")["defaults"], "input": block}}
    )
    x = torch.ones(2, 16)
    with torch.no_grad():
        fast.weight.copy_(torch.full((4, 16), 0.40625))
        y = fast(x)
    arithmetic = Arithmetic.parse("products=e5m2/rounding=stochastic")
    codes, w = torch.full((2, 8), 448.0), torch.full((8, 4), 0.40625)
    scale = torch.tensor(1.0) / 448
    parts = [by_gfloat(codes, w, arithmetic, key_of(11, "linear", "output", part)) * scale for part in (0, 1)]
    torch.testing.assert_close(y, parts[0] + parts[1])
    assert not torch.equal(*parts)
    conv = fp8fx.compile(nn.Conv1d(2, 2, 1, groups=2, bias=False), recipe(products="e5m2"))
    with torch.no_grad():
        conv.weight.fill_(0.40625)
        y = conv(torch.full((2, 2, 9), 1.125))
    wide = [
        by_gfloat(torch.full((1, 1), 0.40625), torch.full((1, 9), 1.125), arithmetic, key_of(11, "conv1d", "output", p)) for p in range(4)
    ]
    assert torch.equal(y.reshape(4, 1, 9), torch.stack(wide))


def test_without_bits_it_says_so() -> None:
    a = torch.ones(2, 32)
    with pytest.raises(ModelError, match="needs random bits: a seed, or the rng input"):
        torch.ops.fp8fx.scaled_mm(a, None, "", [], a.mT, None, "", [], None, torch.float32, "products=e5m2/rounding=stochastic")
