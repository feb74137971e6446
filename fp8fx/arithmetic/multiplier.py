"""Approximate multipliers as tables, and the same tables as a few float matrix products.

    mantissa table  T [2^m, 2^m], m from 0 to 7:   a = +-2^e (1 + i / 2^m), b = +-2^f (1 + j / 2^m)   a * b ~ +-2^(e + f) T[i, j]
    code table      T [256, 256]:                  codes i and j of one format of 8 bits               a * b ~ T[i, j]

An exact multiplier has T[i, j] = (1 + i / 2^m) (1 + j / 2^m), in [1, 4). Operands with more than m mantissa bits are rounded to m first
(nearest, ties to even): such a multiplier has no more input bits. Zero times anything is zero, subnormals of a narrow format are
normalized first, and where an operand is inf or NaN the product is IEEE's.

A table of 2^m rows is a sum of outer products, T = sum_r u_r v_r^T, so that a whole matrix product is r float ones:

    sum_k T-product(a_ik, b_kj) = sum_r sum_k (+-2^e u_r[i_k]) (+-2^f v_r[j_k])

*by rows*: u_r picks the elements of A whose row of T is the r-th different one. Exactly one of the r terms of each product is not zero,
and it is T[i, j] itself: exact, with r at most 2^m. *by rank*: the singular value decomposition cut where the rest is below 2^-22 of the
largest entry: fewer terms for a smooth table, with a bound on each product. See `factors`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fp8fx import formats
from fp8fx.errors import ModelError, allowed, nearest
from fp8fx.formats import Format
from fp8fx.numerics.eager import capturing

LARGEST_MANTISSA = 7
CODES = 256
MOST_TERMS = 16  # float products that still beat one table look-up per product
TOLERANCE = 2.0**-22


@dataclass(frozen=True)
class Factors:
    """T ~ left [n, r] @ right [r, n], float32. `bound`: the largest |T - left right|; 0.0 if the terms are T's own entries."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    bound: float

    @property
    def terms(self) -> int:
        return self.left.shape[1]


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A table of products. `mantissa_bits` is None for one over codes; `format` is the one of those codes, "" where nobody said."""

    name: str
    table: Tensor = field(repr=False)  # float32 [n, n]
    mantissa_bits: int | None
    format: str = ""
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def mismatch(self, names: Collection[str]) -> str | None:
        """Why operands in these formats ("": float32) cannot be looked up in a table over codes; None where they can, or it is none."""
        known = ", ".join(sorted({name or "float32" for name in names}))
        if self.mantissa_bits is not None:
            return None
        if len(set(names)) > 1 or any(not name or formats.get(name).bits != 8 for name in names):
            return f"a table over codes needs every operand in one format of 8 bits; here they are {known}"
        if self.format and any(formats.get(name).name != self.format for name in names):
            return f"table {self.name} is one over the codes of {self.format}; here the operands are {known}"
        return None

    @functools.cached_property
    def factors(self) -> Factors | None:
        """The table as the fewest float products: by rank where that takes fewer than by rows; None if both take more than MOST_TERMS."""
        by_rows = _by_rows(self.table)
        by_rank = _by_rank(self.table, min(by_rows.terms - 1, MOST_TERMS))
        return by_rank or (by_rows if by_rows.terms <= MOST_TERMS else None)

    def factors_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`factors` as the products read them: left and right^T, both [n, r]."""
        factors = self.factors
        assert factors is not None
        return self._on(device, "left", lambda: factors.left), self._on(device, "right", lambda: factors.right.mT.contiguous())

    def table_on(self, device: torch.device, format: str = "") -> Tensor:
        """The table as the tiles read it, for operands in `format`: at codes of inf and NaN, which are themselves the first factor there,
        one over codes has the sign of the other operand, so that the product is IEEE's."""
        if self.mantissa_bits is not None:
            return self._on(device, "table", lambda: self.table)
        return self._on(device, f"table {format}", lambda: self._over_codes(format))

    def _over_codes(self, format: str) -> Tensor:
        values = torch.tensor(formats.get(format).codes())
        special = ~values.isfinite()
        sign = torch.where(special, 1.0, values.sign())
        table = torch.where(special[:, None], sign, self.table)
        return torch.where(special, sign[:, None], table)

    def _on(self, device: torch.device, what: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, on `device`; made once. ModelError inside of a CUDA graph, which would have to own it."""
        found = self._copies.get((what, device))
        if found is None:
            if capturing(device):
                raise ModelError(
                    f"multiplier {self.name}: its table is not on {device} yet, and a CUDA graph that is being captured cannot copy it "
                    "there: run the product once before the capture, with operands in the same formats"
                )
            with _disable_current_modes(), torch.inference_mode(False):
                found = self._copies.setdefault((what, device), make().to(device))
        return found


def mitchell_table(mantissa_bits: int) -> Tensor:
    """Mitchell's logarithmic multiplier (IRE Trans. EC-11, 1962): log2(1 + x) ~ x both ways; float32 [2^m, 2^m].

    T = 1 + x + y where x + y < 1, else 2 (x + y): at most 1/9 below the true product, exact where x or y is 0.
    """
    x = torch.arange(2**mantissa_bits) / 2**mantissa_bits
    s = x[:, None] + x
    return torch.maximum(s + 1.0, s + s)


@functools.cache
def mitchell(mantissa_bits: int) -> Multiplier:
    return Multiplier("mitchell", mitchell_table(mantissa_bits), mantissa_bits)


_REGISTERED: dict[str, Multiplier] = {}
BUILT_IN = ("exact", "mitchell")


def register(name: str, table: Any, format: str | torch.dtype | Format | None = None) -> Multiplier:
    """Make `table` known as `name` in this process: a tensor, an array or nested lists, [2^m, 2^m] or [256, 256] as above.

    format: of a code table, the format of its codes: operands in another one are refused, and entries at codes of inf and NaN, which are
    never read, may be inf or NaN themselves.
    Raises ModelError for a name that is taken (by another table) or no identifier, and for what is wrong with the table or the format;
    FormatError for an unknown format.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in BUILT_IN:
        raise ModelError(f"a multiplier's name is an identifier other than {allowed(BUILT_IN)}; got {name!r}")
    made = checked(name, table, "" if format is None else formats.get(format).name)
    old = _REGISTERED.get(name)
    if old is not None and not (torch.equal(old.table, made.table) and old.format == made.format):
        raise ModelError(f"a multiplier called {name!r} is registered already, with another table or format: choose another name")
    return _REGISTERED.setdefault(name, made)


def find(name: str) -> Multiplier:
    """The table called `name`: a registered name or the path of a .npy file, which is read once per process."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.endswith(".npy"):
        return _load(os.path.abspath(name))
    words = (*BUILT_IN, *_REGISTERED)
    raise ModelError(
        f"unknown multiplier {name!r}; allowed: {', '.join(words)}, the path of a .npy file, or a name given to "
        f"fp8fx.arithmetic.register(name, table) in this process.{nearest(name, words)}"
    )


@functools.lru_cache(maxsize=64)
def _load(path: str) -> Multiplier:
    try:
        array = numpy.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ModelError(f"no file {path}: a multiplier's table is a .npy file, written with numpy.save(path, table)") from None
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path} cannot be read as a table: {error}; write one with numpy.save(path, table)") from None
    return checked(path, array)


def checked(name: str, table: Any, format: str = "") -> Multiplier:
    """A Multiplier of `table`, or a ModelError that says what is wrong with it. `format`: as in `register`, by name."""
    given = _tensor(name, table)
    size = given.shape[0] if given.dim() == 2 else 0
    mantissa_bits = size.bit_length() - 1
    if given.dim() != 2 or given.shape[1] != size or size < 1 or size != 1 << mantissa_bits or mantissa_bits > LARGEST_MANTISSA + 1:
        sizes = ", ".join(str(2**m) for m in range(LARGEST_MANTISSA + 1))
        raise ModelError(
            f"multiplier {name}: got a table of shape {list(given.shape)}; allowed: [n, n] with n = {sizes} (pairs of mantissas), or "
            f"[{CODES}, {CODES}] (pairs of codes of an 8-bit format)"
        )
    if format:
        given = _without_specials(name, given, formats.get(format))
    single = given.to(torch.float32)
    why = "is not a number: every product must be finite; those of inf and NaN are IEEE's, whatever the table has: write 0 there"
    why += "" if format or size != CODES else ", or say register(name, table, format=...)"
    _refuse(name, given, ~torch.isfinite(given.double()), why)
    _refuse(name, given, single.double() != given.double(), "is not a float32 number: round the table first (table.astype('float32'))")
    if size == CODES:
        return Multiplier(name, single, None, format)
    what = "lies outside [0, 8]: entries are products of significands 1 + i / 2^m, about 1 to 4; divide integer products by 4^m"
    _refuse(name, given, (single < 0.0) | (single > 8.0), what)
    return Multiplier(name, single, mantissa_bits)


def _without_specials(name: str, table: Tensor, format: Format) -> Tensor:
    """A code table with 0 at the codes of inf and NaN, whose entries are never read."""
    if table.shape[0] != CODES or format.bits != 8:
        raise ModelError(
            f"multiplier {name}: format={format.name} is for tables [{CODES}, {CODES}] over the codes of a format of 8 bits; this is a "
            f"table of shape {list(table.shape)}, and {format.name} has {format.bits} bits"
        )
    special = ~torch.tensor(format.codes()).isfinite()
    return torch.where(special[:, None] | special, torch.zeros_like(table), table)


def _tensor(name: str, table: Any) -> Tensor:
    if not isinstance(table, Tensor):
        if not isinstance(table, numpy.ndarray | Sequence) or isinstance(table, str):
            raise ModelError(f"multiplier {name}: a table is a tensor, an array or nested lists of numbers; got {type(table).__name__}")
        try:
            table = torch.from_numpy(numpy.ascontiguousarray(table).copy())
        except (TypeError, ValueError) as error:
            raise ModelError(f"multiplier {name}: not a table of numbers: {error}; allowed: float or integer entries") from None
    if table.dtype == torch.bool or table.is_complex() or not (table.is_floating_point() or table.dtype in _INTEGERS):
        raise ModelError(f"multiplier {name}: got a table of {table.dtype}; allowed: float or integer entries")
    return table.detach().cpu().clone()


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _refuse(name: str, table: Tensor, wrong: Tensor, what: str) -> None:
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ModelError(f"multiplier {name}: entry {place}, {table[tuple(place)].item()}, {what}")


def _by_rows(table: Tensor) -> Factors:
    """One term per different row, or per different column where those are fewer; a row of zeros needs none."""
    rows, of_row = torch.unique(table, dim=0, return_inverse=True)
    columns, of_column = torch.unique(table.mT, dim=0, return_inverse=True)
    if columns.shape[0] < rows.shape[0]:
        return Factors(columns.mT.contiguous(), _one_hot(of_column, columns.shape[0]).mT.contiguous(), 0.0)
    return Factors(_one_hot(of_row, rows.shape[0]), rows, 0.0)


def _one_hot(index: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(index, size).float()


def _by_rank(table: Tensor, most: int) -> Factors | None:
    """The least r up to `most` for which the rest stays below TOLERANCE; both factors are float32, and the bound is taken from those."""
    exact = table.double()
    u, s, vh = torch.linalg.svd(exact)
    allowed_error = TOLERANCE * float(exact.abs().max())
    for r in range(1, most + 1):
        root = s[:r].sqrt()
        left, right = (u[:, :r] * root).float(), (root[:, None] * vh[:r]).float()
        bound = float((exact - left.double() @ right.double()).abs().max())
        if bound <= allowed_error:
            return Factors(left, right, bound)
    return None
