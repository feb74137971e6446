"""Products under an arithmetic against the exact definition: bit for bit in tiles, within the bound of another order of sums elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8fx import formats
from fp8fx.arithmetic import Arithmetic, form_of, matmul, mitchell_table, register
from fp8fx.arithmetic.definition import dot
from fp8fx.arithmetic.product import product
from fp8fx.errors import FormatError, ModelError

generator = torch.Generator().manual_seed(5)
register("rough3", torch.rand(8, 8, generator=generator) * 3 + 1)
register("rough6", torch.rand(64, 64, generator=generator) * 3 + 1)
register("codes", torch.randn(256, 256, generator=generator))
LINES = torch.arange(256, dtype=torch.float32)
register("smooth_codes", LINES[:, None] * LINES)


def on_grid(*shape: int, format: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return (torch.randn(shape, generator=generator) * 3).to(format).float()


def defined(a: Tensor, b: Tensor, arithmetic: Arithmetic, format: str = "") -> Tensor:
    rows = [[dot(a[i].tolist(), b[:, j].tolist(), arithmetic, format) for j in range(b.shape[1])] for i in range(a.shape[0])]
    return torch.tensor(rows, dtype=torch.float64).float()


TILED = [
    "products=float16",
    "products=e4m3fn/overflow=saturate",
    "products=e5m2/output=e5m2",
    "products=e5m6/rounding=up",
    "products=e3m4fn/rounding=down/overflow=saturate/shift=-3",
    "accumulate=float16",
    "accumulate=float16/shift=-5/output=float16",
    "accumulate=e6m9/rounding=toward_zero/chunk=5/outer=bfloat16",
    "products=bfloat16/accumulate=bfloat16/rounding=nearest_away",
    "accumulate=hopper_fast",
    "accumulate=hopper_fast/chunk=128",
    "accumulate=hopper_fast/chunk=20/outer=float16",
    "multiplier=mitchell",
    "multiplier=mitchell/accumulate=float16",
    "multiplier=rough3/products=e5m4",
    "multiplier=rough6",
    "multiplier=codes/operands=e4m3fn",
    "multiplier=codes/operands=e4m3fn/accumulate=bfloat16",
]


@pytest.mark.parametrize("text", TILED)
def test_tiles_are_the_definition(text: str) -> None:
    arithmetic = Arithmetic.parse(text)
    assert form_of(arithmetic) == "tiles"
    a, b = on_grid(3, 75), on_grid(75, 3)
    a[0, :4], b[2:5, 1] = 0.0, 2.0**-9
    if "codes" in text:  # whose definition looks every code up in a list
        a, b = a[:, :9], b[:9]
    torch.testing.assert_close(matmul(a, b, arithmetic), defined(a, b, arithmetic), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["products=e4m11", "accumulate=float16", "multiplier=mitchell", "multiplier=rough6", "accumulate=e8m13"])
def test_operands_of_any_width(text: str) -> None:
    """float32 operands: a product is rounded to float32 first, and a table's operands to its mantissa."""
    a, b = torch.randn(2, 40, generator=generator), torch.randn(40, 2, generator=generator)
    arithmetic = Arithmetic.parse(text)
    torch.testing.assert_close(matmul(a, b, arithmetic), defined(a, b, arithmetic), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(70, 1, 600), (33, 64, 513), (1, 3, 1)])
def test_every_tile_is_written(size: tuple[int, int, int]) -> None:
    m, k, n = size
    a, b = on_grid(m, k), on_grid(k, n)
    whole = matmul(a, b, "accumulate=float16")
    rows = torch.cat([matmul(a[i : i + 1], b, "accumulate=float16") for i in range(m)])
    assert torch.equal(whole, rows)


FACTORED = ["multiplier=mitchell", "multiplier=rough3", "multiplier=mitchell/chunk=16/outer=float16", "multiplier=smooth_codes"]


@pytest.mark.parametrize("text", FACTORED)
def test_factored_tables(text: str) -> None:
    """The same products, added in another order: K additions err by K 2^-24 of the sum of magnitudes each way, and a table by rank by its
    bound beside that (2^-22 of its largest entry, per product)."""
    arithmetic = Arithmetic.parse(text)
    formats = ("e4m3fn", "e4m3fn")
    assert form_of(arithmetic, formats) == "factored"
    a, b = on_grid(4, 20), on_grid(20, 3)
    y, expected = product(a, b, arithmetic, formats), defined(a, b, arithmetic, "e4m3fn")
    table = arithmetic.table(3)
    assert table is not None
    magnitudes = (a.abs() @ b.abs()) * 4 if table.mantissa_bits is not None else torch.full((4, 3), 20 * 255.0**2)
    step = 2.0**-10 if "outer" in text else 0.0  # a partial sum next to a midpoint of float16
    assert ((y - expected).abs() <= magnitudes * (2 * 40 * 3 * 2.0**-24 + 2.0**-22) + step * expected.abs()).all()


def test_the_form_of_a_product() -> None:
    known = ("e4m3fn", "e5m2")
    assert form_of(Arithmetic()) == "float"
    assert form_of(Arithmetic(multiplier="mitchell"), known) == "factored"
    assert form_of(Arithmetic(multiplier="mitchell")) == "tiles"  # no table without a width
    assert form_of(Arithmetic(multiplier="mitchell", operands="e4m3fn")) == "factored"
    assert form_of(Arithmetic(multiplier="rough6"), known) == "tiles"  # 64 different rows
    assert form_of(Arithmetic(multiplier="mitchell", accumulate="float16"), known) == "tiles"


@pytest.mark.parametrize("text", ["multiplier=mitchell", "multiplier=rough3", "accumulate=hopper_fast", "accumulate=float16"])
def test_inf_and_nan(text: str) -> None:
    """Where a row or a column holds one, the result is what IEEE's sum of these products is; everywhere else it is as without."""
    a, b = on_grid(4, 33), on_grid(33, 5)
    plain = product(a, b, Arithmetic.parse(text), ("e5m2", "e5m2"))
    a[1, 2], b[4, 3], b[7, 3], a[2, 9] = math.inf, math.inf, -math.inf, math.nan
    b[2, 0] = 0.0
    y = product(a, b, Arithmetic.parse(text), ("e5m2", "e5m2"))
    exact = a @ b
    wrong = ~exact.isfinite()
    torch.testing.assert_close(y[wrong], exact[wrong], rtol=0, atol=0, equal_nan=True)
    untouched = [1, 2, 4]
    assert torch.equal(y[0, untouched], plain[0, untouched])
    assert torch.equal(y[3, untouched], plain[3, untouched])


def test_overflow_of_an_adder() -> None:
    a, b = torch.full((1, 2), 448.0), torch.full((2, 1), 448.0)
    assert matmul(a, b, "accumulate=float16").item() == math.inf
    assert matmul(a, b, "accumulate=float16/overflow=saturate").item() == 65504.0
    assert matmul(a, b, "accumulate=float16/shift=-3").item() == 2 * 448.0**2


def test_hopper_loses_what_is_small() -> None:
    """Terms 2^14 below the largest are cut off whole, and all others downwards: a fp32 sum keeps both."""
    a, b = torch.ones(1, 32), torch.full((32, 1), 2.0**-9)
    a[0, 0], b[0, 0] = 32.0, 1.0
    assert (a @ b).item() == 32.0 + 31 * 2.0**-9
    assert matmul(a, b, "accumulate=hopper_fast").item() == 32.0
    ones = torch.ones(1, 20480)
    assert matmul(ones, ones.mT, "accumulate=hopper_fast").item() == 2.0**14  # from where on 1 is half a step
    assert matmul(ones, ones.mT, "accumulate=hopper_fast/chunk=128").item() == 20480
    torch.manual_seed(0)
    x, w = on_grid(4, 2048).abs(), on_grid(2048, 4).abs()
    exact = x.double() @ w.double()
    errors = [(1 - matmul(x, w, f"accumulate=hopper_fast{t}").double() / exact).mean().item() for t in ("", "/chunk=128")]
    assert errors[0] > 4 * errors[1] > 0.0  # promotion every 128 elements takes most of the bias away


def test_batches_broadcast() -> None:
    a, b = on_grid(2, 1, 3, 8), on_grid(4, 8, 5)
    for text in ("accumulate=float16", "exact", "chunk=4/outer=float16"):
        y = matmul(a, b, text)
        assert y.shape == (2, 4, 3, 5)
        assert torch.equal(y[1, 2], matmul(a[1, 0], b[2], text))
    assert torch.equal(matmul(a, b[0], "products=e5m2"), matmul(a, b[:1], "products=e5m2"))
    assert matmul(torch.empty(2, 0), torch.empty(0, 3), "accumulate=float16").tolist() == [[0.0] * 3] * 2
    assert matmul(torch.empty(0, 4), torch.empty(4, 3), "multiplier=mitchell").shape == (0, 3)


@pytest.mark.parametrize("text", ["multiplier=mitchell/products=e5m4"])
def test_inductor_has_the_same_bits(text: str) -> None:
    """Tiles that are whole and that are padded, and elements of k beyond the last whole call."""
    a, b = on_grid(130, 70), on_grid(70, 520)
    a[5, :9] = 2.0**-9
    assert torch.equal(matmul(a, b, text, compiled=True), matmul(a, b, text))


def test_texts() -> None:
    for text in (*TILED, *FACTORED, "exact"):
        arithmetic = Arithmetic.parse(text)
        assert Arithmetic.parse(arithmetic.text) == arithmetic
        assert not set(arithmetic.text) & {";", ","}
    assert Arithmetic.of({"accumulate": {"chunk": 64, "inner": "fp16", "outer": "fp32"}}).text == "accumulate=float16/chunk=64"
    assert Arithmetic().plain
    assert not Arithmetic(operands="e5m2").plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"accumulate": "hoper_fast"}, "accumulate: unknown number format 'hoper_fast'.*Did you mean 'hopper_fast'"),
        ({"products": "float8"}, "unknown number format 'float8'"),
        ({"rounding": "stochastics"}, r"unknown rounding 'stochastics' of products and sums.*Did you mean 'stochastic'"),
        ({"overflow": "wrap"}, "unknown overflow policy 'wrap'"),
        ({"chunk": -1}, "chunk: got -1"),
        ({"chunk": 2.5}, "chunk: got 2.5"),
        ({"shift": 99}, "shift: got 99"),
        ({"outer": "float16"}, "there are partial sums only where chunk is 1 or more"),
        ({"gradients": "approximate"}, "gradients: got 'approximate'; allowed: exact or same"),
        ({"accumulate": "hopper_fast", "products": "e5m2"}, "hopper_fast adds exact products: leave products out"),
        ({"accumulate": "hopper_fast", "multiplier": "mitchell"}, "hopper_fast adds exact products: multiplier must be exact"),
        ({"accumulate": "hopper_fast", "shift": 2}, "leave shift out"),
        ({"multiplier": "codes", "operands": "e2m1"}, "e2m1 has 4 bits, the codes of codes have 8"),
        ({"products": "e3m2"}, "e3m2 has neither inf nor NaN, so overflow must be saturate"),
        ({"multiplicator": "mitchell"}, "unknown key 'multiplicator'.*Did you mean 'multiplier'"),
        ("chunk=8/accumulate=fp16/chunk=4", "chunk: given 2 times, as 8 and 4; write it once"),
        ({"accumulate": {"chunk": 8, "inner": "float16"}, "chunk": 4}, "chunk: given twice, beside accumulate and in accumulate"),
        ({"accumulate": {"chunk": 8, "outer": "float16"}, "outer": "float32"}, "outer: given twice"),
        ({"products": "e4m3"}, r"products: format 'e4m3' is ambiguous: write e4m3fn \(448\) or e4m3ieee \(240\)$"),
        ({"accumulate": "e3m4"}, r"accumulate: format 'e3m4' is ambiguous: write e3m4fn \(30\) or e3m4ieee \(15.5\)$"),
        ({"accumulate": "hoper_fast"}, "accumulate: unknown number format.*Also allowed: hopper_fast. Did you mean 'hopper_fast'"),
        ({"outer": "flaot16"}, "outer: unknown number format 'flaot16'.*Did you mean 'float16'"),
        ({"operands": "e4m3"}, "operands: format 'e4m3' is ambiguous"),
        ({"rounding": "nearest"}, "rounding: unknown rounding 'nearest'"),
        ({"accumulate": {"inner": "float16"}}, "accumulate: got .*allowed: a format, hopper_fast"),
    ],
)
def test_impossible_arithmetic(keys: str | dict[str, object], message: str) -> None:
    with pytest.raises((FormatError, ModelError), match=message):
        Arithmetic.of(keys)


def test_codes_need_a_format() -> None:
    with pytest.raises(ModelError, match=r"needs every operand in one format of 8 bits; here they are float32. Write operands: e4m3fn"):
        matmul(torch.ones(2, 2), torch.ones(2, 2), "multiplier=codes")
    with pytest.raises(ModelError, match="here they are e4m3fn, e5m2"):
        product(torch.ones(2, 2), torch.ones(2, 2), Arithmetic(multiplier="codes"), ("e4m3fn", "e5m2"))


def test_a_code_table_of_a_named_format() -> None:
    """bfloat16 products by table are those that `products: bfloat16` rounds; NaN where the codes are NaN; other formats are refused."""
    values = torch.tensor(formats.get("e4m3fn").codes())
    table = (values[:, None] * values).bfloat16().float()
    assert bool(table.isnan().any())
    made = register("short_products", table, format="e4m3fn")
    assert register("short_products", table, format=torch.float8_e4m3fn) is made
    a, b = on_grid(9, 20), on_grid(20, 7)
    rest = "operands=e4m3fn/accumulate=float16"
    assert torch.equal(matmul(a, b, f"multiplier=short_products/{rest}"), matmul(a, b, f"products=bfloat16/{rest}"))
    a[0, 0] = float("nan")
    assert bool(matmul(a, b, f"multiplier=short_products/{rest}")[0].isnan().all())
    with pytest.raises(ModelError, match="operands: table short_products is one over the codes of e4m3fn; here the operands are e5m2"):
        Arithmetic(multiplier="short_products", operands="e5m2")
    with pytest.raises(ModelError, match=r"is one over the codes of e4m3fn; here the operands are e5m2. Write operands: e4m3fn"):
        product(a, b, Arithmetic(multiplier="short_products"), ("e5m2", "e5m2"))
    with pytest.raises(ModelError, match=r"nan, is not a number.*write 0 there, or say register\(name, table, format=...\)"):
        register("unnamed", table)
    with pytest.raises(ModelError, match=r"entry \[0, 127\], nan, is not a number"):
        register("other", table, format="e5m2fnuz")
    with pytest.raises(ModelError, match="registered already, with another table or format"):
        register("short_products", made.table)
    for wrong, format in ((mitchell_table(3), "e4m3fn"), (table, "e2m1")):
        with pytest.raises(ModelError, match=r"is for tables \[256, 256\] over the codes of a format of 8 bits"):
            register("wrong", wrong, format=format)


@pytest.mark.parametrize("accumulate", ["float32", "e8m13"])
def test_infinite_codes_of_a_table_are_ieee(accumulate: str) -> None:
    """Whatever the table has there: signs, 0 inf = NaN."""
    values = torch.tensor(formats.get("e5m2").codes())
    register("products_of_e5m2", (values[:, None] * values).nan_to_num(0.0, 0.0, 0.0))
    inf = float("inf")
    a, b = torch.tensor([[inf], [-inf], [2.0], [0.0]]), torch.tensor([[2.0, -1.0, 0.0, inf, -inf]])
    got = product(a, b, Arithmetic(multiplier="products_of_e5m2", accumulate=accumulate), ("e5m2", "e5m2"))
    assert torch.equal(got.nan_to_num(7.0, 100.0, -100.0), (a @ b).nan_to_num(7.0, 100.0, -100.0))


def test_a_table_of_exact_products_is_a_float_product() -> None:
    s = 1 + torch.arange(8) / 8
    register("exact3", s[:, None] * s)
    a, b = on_grid(16, 32), on_grid(32, 16)
    torch.testing.assert_close(product(a, b, Arithmetic(multiplier="exact3"), ("e4m3fn",) * 2), a @ b, rtol=1e-5, atol=1e-3)
    assert mitchell_table(3).shape == (8, 8)
