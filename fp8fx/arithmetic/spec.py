"""`Arithmetic`: how one matrix product multiplies and adds, as a value with a text form.

y = Q_output( sum over k of Q_products( multiplier(a_k, b_k) ) )       the sum as `accumulate`, `chunk` and `outer` say

Arithmetic(multiplier="mitchell", accumulate="float16", chunk=64).text == "multiplier=mitchell/accumulate=float16/chunk=64"
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from fp8fx import formats
from fp8fx.arithmetic import multiplier as multipliers
from fp8fx.arithmetic.multiplier import BUILT_IN, Multiplier
from fp8fx.arithmetic.numbers import check_mode, number
from fp8fx.errors import FormatError, ModelError, allowed, nearest
from fp8fx.formats import Format

HOPPER = "hopper_fast"
GRADIENTS = ("exact", "same")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The arithmetic of one product. All defaults together are an ordinary float32 product.

    operands: an 8-bit format that both operands are rounded to first, without a scale; "" leaves them. A code table needs to know
        the format of its codes, from here or from the site.
    multiplier: exact, mitchell, a name given to `register`, or the path of a .npy file (see multiplier.py).
    products: the format each product is rounded to.
    accumulate: the format of the running sum, rounded after every addition, in ascending k; float32 leaves the order of exact
        products open, as every float product does. `hopper_fast`: the model of Hopper's FP8 instructions (see tiles.py).
    chunk: so many elements of k are summed in `accumulate`, and the partial sums in `outer`; 0: one chunk.
    outer: the format of the sum of the partial sums, rounded after every addition.
    output: the format the finished sum is rounded to.
    shift: products are multiplied by 2^shift before they are rounded, and the finished sum by 2^-shift: room in a narrow format. Codes of
        E4M3 that fill their range have products up to 200,704, which float16 has not.
    rounding, overflow: of products and sums. `stochastic` takes its bits from a seed, by position (stream.py). An adder overflows to inf,
        so the default is nonfinite, unlike that of tensors.
    gradients: `exact`, straight through: both gradient products are ordinary ones; `same`: they use this arithmetic too.

    Raises FormatError or ModelError for what cannot be.
    """

    operands: str = ""
    multiplier: str = "exact"
    products: str = "float32"
    accumulate: str = "float32"
    chunk: int = 0
    outer: str = "float32"
    output: str = "float32"
    shift: int = 0
    rounding: str = "nearest_even"
    overflow: str = "nonfinite"
    gradients: str = "exact"

    def __post_init__(self) -> None:
        if self.operands != "":
            self._name("operands", formats.get)
        for key in ("products", "accumulate", "outer", "output"):
            if getattr(self, key) != HOPPER or key != "accumulate":
                self._name(key, number)
        check_mode(self.rounding, self.overflow)
        for key in ("products", "accumulate", "outer", "output"):
            name = getattr(self, key)
            if name != HOPPER and self.overflow == "nonfinite" and number(name).nan == "none":
                raise FormatError(f"{key}: {name} has neither inf nor NaN, so overflow must be saturate")
        if type(self.chunk) is not int or self.chunk < 0:
            raise ModelError(f"chunk: got {self.chunk!r}; allowed: a whole number, 0 for one chunk")
        if type(self.shift) is not int or abs(self.shift) > 60:
            raise ModelError(f"shift: got {self.shift!r}; allowed: a whole number from -60 to 60")
        if self.chunk == 0 and self.outer != "float32":
            raise ModelError("outer: there are partial sums only where chunk is 1 or more: write chunk, or accumulate instead of outer")
        if self.gradients not in GRADIENTS:
            raise ModelError(f"gradients: got {self.gradients!r}; allowed: {allowed(GRADIENTS)}.{nearest(self.gradients, GRADIENTS)}")
        if self.accumulate == HOPPER and self.products != "float32":
            raise ModelError("hopper_fast adds exact products: leave products out, or choose another accumulate")
        if self.accumulate == HOPPER and self.shift:
            raise ModelError("hopper_fast has the range of float32: leave shift out")
        self._check_multiplier()

    def _name(self, key: str, find: Callable[[Any], Format]) -> None:
        """The format under `key` by its usual name. Raises FormatError with the key in front."""
        given = getattr(self, key)
        try:
            object.__setattr__(self, key, find(given).name)
        except FormatError as error:
            also = key == "accumulate" and given not in formats.AMBIGUOUS
            raise FormatError(f"{key}: {error}{f' Also allowed: {HOPPER}.{nearest(given, (HOPPER,))}' if also else ''}") from None

    def _check_multiplier(self) -> None:
        table = self.table(None)
        if self.accumulate == HOPPER and self.multiplier != "exact":
            raise ModelError("hopper_fast adds exact products: multiplier must be exact, or choose another accumulate")
        if table is not None and table.mantissa_bits is None and self.operands and formats.get(self.operands).bits != 8:
            raise ModelError(f"operands: {self.operands} has {formats.get(self.operands).bits} bits, the codes of {self.multiplier} have 8")
        if table is not None and self.operands and (wrong := table.mismatch([self.operands])):
            raise ModelError(f"operands: {wrong}")

    def table(self, mantissa_bits: int | None) -> Multiplier | None:
        """The multiplier's table; for Mitchell's that of `mantissa_bits`. None for an exact one and for Mitchell's of no given width."""
        if self.multiplier not in BUILT_IN:
            return multipliers.find(self.multiplier)
        return None if self.multiplier == "exact" or mantissa_bits is None else multipliers.mitchell(mantissa_bits)

    @property
    def plain(self) -> bool:
        """An ordinary product of the operands as they are, summed in float32."""
        return not self.operands and self.text in ("exact", "gradients=same")

    @property
    def stochastic(self) -> bool:
        """Random bits are drawn: something is rounded that way."""
        rounded = (self.products, self.accumulate, self.outer, self.output)
        return self.rounding == "stochastic" and any(name not in ("float32", HOPPER) for name in rounded)

    @property
    def text(self) -> str:
        """`key=value` for what differs from the default, joined by `/`; `exact` where nothing does."""
        parts = [f"{f.name}={_escaped(getattr(self, f.name))}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "/".join(parts) or "exact"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Arithmetic:
        """Read `text` back: `Arithmetic.parse(a.text) == a`."""
        parts = [] if text == "exact" else [part.partition("=") for part in text.split("/")]
        for key in {key for key, _, _ in parts}:
            values = [value for other, _, value in parts if other == key]
            if len(values) > 1:
                raise ModelError(f"{key}: given {len(values)} times, as {' and '.join(values)}; write it once")
        return Arithmetic(**_keys(parts))

    @staticmethod
    def of(value: Arithmetic | str | Mapping[str, Any]) -> Arithmetic:
        """An Arithmetic as it is, from its text, or from its keys; `accumulate` may be {chunk, inner, outer}."""
        if isinstance(value, Arithmetic):
            return value
        if isinstance(value, str):
            return Arithmetic.parse(value)
        if not isinstance(value, Mapping):
            raise ModelError(f"an arithmetic is an Arithmetic, its text or a mapping of its keys; got {type(value).__name__}")
        given = dict(value)
        if isinstance(given.get("accumulate"), Mapping):
            given |= _chunked(given.pop("accumulate"), given)
        _known(given)
        return Arithmetic(**given)


Given = Arithmetic | str | Mapping[str, Any]  # what `Arithmetic.of` takes


def _chunked(given: Mapping[str, Any], beside: Collection[str]) -> dict[str, Any]:
    """{chunk: 64, inner: float16, outer: float32} as Arithmetic's own keys, none of which may stand beside it."""
    unknown = [str(key) for key in given if key not in ("chunk", "inner", "outer")]
    if unknown or "chunk" not in given:
        raise ModelError(f"accumulate: got {dict(given)}; allowed: a format, {HOPPER}, or {{chunk: 64, inner: float16, outer: float32}}")
    check_once(given, beside)
    names = {"chunk": "chunk", "inner": "accumulate", "outer": "outer"}
    return {names[key]: value for key, value in given.items()}


def check_once(sums: Collection[str], beside: Collection[str]) -> None:
    """Raise ModelError for a key inside accumulate: {...} that is also beside it, where only one could count."""
    for key in ("chunk", "outer"):
        if key in sums and key in beside:
            raise ModelError(f"{key}: given twice, beside accumulate and in accumulate: {{{key}: ...}}; write it once")


def _known(given: Mapping[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(Arithmetic)]
    for key in given:
        if key not in names:
            hint = nearest(key, names) or " Write key=value, as in 'multiplier=mitchell/accumulate=float16'"
            raise ModelError(f"unknown key {key!r} of an arithmetic; allowed: {allowed(names)}.{hint}")


def _keys(parts: list[tuple[str, str, str]]) -> dict[str, Any]:
    given: dict[str, Any] = {key: unquote(value) for key, _, value in parts}
    _known(given)
    for key in ("chunk", "shift"):
        try:
            given |= {key: int(given[key])} if key in given else {}
        except ValueError:
            raise ModelError(f"{key}: got {given[key]!r}; allowed: a whole number") from None
    return given


def _escaped(value: object) -> str:
    """Free of `/`, `=`, `;` and `,`, which have meanings around it; a path is the only value that may hold them."""
    return quote(str(value), safe="")
