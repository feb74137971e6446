"""An independent fake quantization of a model's own sites: the oracle that fp8fx is held against.

    oracle = Oracle(model, "hybrid", decisions=fast.plan(), dtype=torch.float64)
    y = oracle(x)                           # a float64 copy of the model, each product on rounded operands
    y.sum().backward()                      # oracle.gradients(): rounded dY, products with the rounded operands

It shares no arithmetic with fp8fx: rounding is a cast to ml_dtypes' float8 types in numpy, products and their gradients are torch's
own (`torch.autograd.grad` of the plain product at the rounded operands), and the sites are found by intercepting the torch functions
of the plain eager model. Two things are read from fp8fx: a recipe's base mode, and the plan's rows, to know which layers are exempt
or leave their output unrounded.

    hybrid   input, weight      q = e4m3fn(x / scale), scale = max(amax, 1e-12) / 448         value q * scale
             dY                 q = e5m2(dY / scale), scale = max(amax, 1e-12) / 57344        value q * scale
    direct   input, weight, output, dY, dX, dW      e5m2(x)                                   no scale
    rowwise, blockwise                              e4m3fn, a scale per row or block          oracle_axes.py

The bias is added before the output is rounded; its gradient is the sum of the unrounded dY. Rounding is to nearest, ties to even,
also where the recipe rounds gradients stochastically: compare exactly under a recipe whose gradient roles are `nearest_even`.
Everything that is rounded is cast to float32 first, as the recipe defines scales and codes on float32, whatever the dtype of the copy.
Under torch.autocast, as in 16-bit models, the operands are read as they are and the result is cast once, to the dtype torch would give.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from oracle_axes import axis_product
from oracle_functions import GROUPED, HANDLERS, grouped_mm
from oracle_rounding import Method, method_of, rounded_output, rounded_product
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

EXACT = 100.0  # dB


class Oracle(TorchFunctionMode):
    """`model` with every site rounded as `recipe` says. Call it, or use it as a context manager around `oracle.model(...)`.

    decisions: the plan of the compiled model: rows that are not "fp8" stay in high precision, rows without an output spec leave their
    output unrounded. Without it nothing is exempt but `*lm_head`, and `direct` rounds every output.
    dtype: run a copy of the model in this dtype (its inputs are cast too). None: run `model` itself, so that its own `.grad` is written.
    """

    def __init__(self, model: nn.Module, recipe: Any = "hybrid", decisions: Any = None, dtype: torch.dtype | None = torch.float64) -> None:
        super().__init__()
        self.model = model if dtype is None else plain(model, dtype)
        self.dtype = dtype
        self.method = method_of(recipe)
        self.rows: dict[str, list[Any]] | None = None
        if decisions is not None:
            self.rows = {row.name: [other for other in decisions.rows if other.name == row.name] for row in decisions.rows}
        self.seen: list[str] = []  # sites in the order of execution, of the latest forward
        self._stack: list[tuple[str, nn.Module]] = []
        self._counts: Counter[str] = Counter()
        self._hooks: list[Any] = []
        self._parameters: dict[int, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return self.model(*cast(args, self.dtype), **cast(kwargs, self.dtype))

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    # -- where in the model -----------------------------------------------------------------------------------------

    def __enter__(self) -> Oracle:
        self._parameters = {id(p): name for name, p in reversed(list(self.model.named_parameters(remove_duplicate=False)))}
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if not self._stack:
                self._counts.clear()
                self.seen = []
            self._stack.append((name, module))

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def _site(self, op: str, weight: Tensor) -> str:
        """A layer's dotted path, or `<module>.<op>[_k]` for a product that is no layer."""
        path, module = self._stack[-1] if self._stack else ("", self.model)
        if weight._base is not None and id(weight._base) in self._parameters:  # a view of a parameter: `weight.t()`
            weight = weight._base
        for attribute, value in module._parameters.items():
            if value is weight:
                return path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
        if id(weight) in self._parameters:
            return self._parameters[id(weight)].removesuffix(".weight")
        if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):  # its weight is computed on the way
            return path
        base = f"{path}.{op}".lstrip(".")
        k = self._counts[base]
        self._counts[base] += 1
        return f"{base}_{k}" if k else base

    def _method(self, op: str, weight: Tensor) -> Method | None:
        """How this site is rounded; None if it stays in high precision."""
        name = self._site(op, weight)
        self.seen.append(name)
        if self.rows is None:
            return None if name.endswith("lm_head") else self.method
        rows = next((self.rows[alias] for alias in self._aliases(name) if alias in self.rows), None)
        if rows is None:
            raise LookupError(f"the plain model runs the site {name!r}, which the plan does not list: {sorted(self.rows)}")
        row = next((row for row in rows if row.op == op), rows[0])  # a tied weight: one name, several operations
        if row.decision != "fp8":
            return None
        return self.method if row.spec.output is not None else Method(**{**vars(self.method), "output": None})

    def _aliases(self, name: str) -> Iterable[str]:
        """The same product may be a matmul here and a bmm there; and a second graph counts from zero again."""
        yield name
        for owner, module in self.model.named_modules(remove_duplicate=False):
            if self._stack and module is self._stack[-1][1]:
                yield owner
        base, _, last = name.rpartition(".")
        op, _, k = last.partition("_")
        if op in ("matmul", "bmm"):
            for number in range(int(k or 0), -1, -1):
                for other in ("matmul", "bmm"):
                    yield ".".join(filter(None, (base, other))) + (f"_{number}" if number else "")

    # -- what is intercepted ----------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = grouped_mm if str(func) == GROUPED else HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **kwargs)
        if func is F.multi_head_attention_forward:  # written in Python: its own products are sites
            with mock.patch.object(F, "has_torch_function", return_value=False), self._nested():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _nested(self) -> TorchFunctionMode:
        outer = self

        class Nested(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return outer.__torch_function__(func, types, args, kwargs)

        return Nested()

    def product(self, op: str, a: Tensor, b: Tensor, function: Callable[[Tensor, Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
        method = self._method(op, b)
        if method is None:
            y = function(a, b)
            return y if bias is None else y + bias
        out = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else a.dtype
        activations = op in ("matmul", "bmm") and not isinstance(b, nn.Parameter)
        with torch.autocast("cpu", enabled=False):  # 16-bit operands: rounded and multiplied in float32, then one cast
            a, b, bias = (x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b, bias))
            if method.axes is not None and op in ("linear", "matmul", "bmm"):
                right = b.mT if function is F.linear else b
                y = axis_product(a, right, method.axes, op == "linear", activations)
            else:
                y = rounded_product(a, b, function, (method.input, method.input if activations else method.weight), method)
            y = y if bias is None else y + bias
            return (y if method.output is None else rounded_output(y, method.output)).to(out)


# -- comparing ------------------------------------------------------------------------------------------------------------


def plain(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of `model` in `dtype`, without gradients so far: the reference that all distances are measured from."""
    copied = copy.deepcopy(model).to(dtype)
    copied.zero_grad()
    return copied


def cast(values: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors in `values` (nested tuples, lists, dicts) in `dtype`; the rest as it is."""
    if isinstance(values, Tensor):
        return values.to(dtype) if dtype is not None and values.is_floating_point() else values
    if isinstance(values, Mapping):
        return {key: cast(value, dtype) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(cast(value, dtype) for value in values)
    return values


def sqnr(x: Tensor, y: Tensor) -> float:
    """20 log10(|x| / |x - y|) in dB of `y` against the reference `x`: inf if equal, -inf if only the reference is zero."""
    x, y = x.detach().double(), y.detach().double()
    signal, noise = torch.linalg.vector_norm(x).item(), torch.linalg.vector_norm(x - y).item()
    if math.isnan(noise) or math.isinf(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf


def margin(fast: float, oracle: float) -> float:
    """The difference of two SQNRs in dB. Above EXACT both are equal: what is left is float32's own rounding of exact values."""
    fast, oracle = min(fast, EXACT), min(oracle, EXACT)
    return 0.0 if fast == oracle else fast - oracle


@dataclass(frozen=True)
class Gradient:
    """One parameter: SQNR in dB of the fast model's gradient and of the oracle's against the reference, and of fast against oracle.

    `zero`: the gradient vanishes in all three (the bias of attention keys: softmax does not see it), to float32's own rounding of the
    terms it is summed from: 1e-6 of the model's largest, 8 units in the last place. Its SQNR is that of rounding noise.
    """

    name: str
    fast: float
    oracle: float
    agreement: float
    finite: bool
    zero: bool = False

    @property
    def margin(self) -> float:
        """How much better (positive) or worse the fast model is than the oracle, in dB."""
        return 0.0 if self.zero else margin(self.fast, self.oracle)


def compare_gradients(reference: nn.Module, oracle: Oracle | nn.Module, fast: nn.Module) -> list[Gradient]:
    """One Gradient per parameter that has one in `reference`. A missing gradient is an error: it is never taken for a zero."""
    others = [dict((o.model if isinstance(o, Oracle) else o).named_parameters()) for o in (oracle, fast)]
    largest = max((_rms(p.grad) for p in reference.parameters() if p.grad is not None), default=0.0)
    found = []
    for name, parameter in reference.named_parameters():
        wanted, (by_oracle, by_fast) = parameter.grad, (other[name].grad for other in others)
        if wanted is None and by_oracle is None and by_fast is None:
            continue
        if wanted is None or by_oracle is None or by_fast is None:
            missing = [who for who, g in (("reference", wanted), ("oracle", by_oracle), ("fast", by_fast)) if g is None]
            raise ValueError(f"{name} has no gradient in: {', '.join(missing)}")
        zero = _rms(wanted) <= 1e-7 * largest and all(_rms(g) <= 1e-6 * largest for g in (by_oracle, by_fast))
        finite = bool(torch.isfinite(by_fast).all())
        found.append(Gradient(name, sqnr(wanted, by_fast), sqnr(wanted, by_oracle), sqnr(by_oracle, by_fast), finite, zero))
    return found


def _rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach().double()).item() / max(x.numel(), 1) ** 0.5


def worst_margin(gradients: Iterable[Gradient]) -> float:
    """The lowest margin in dB; NaN if any gradient is not finite."""
    margins = [g.margin if g.finite else math.nan for g in gradients]
    return math.nan if any(math.isnan(m) for m in margins) else min(margins)
