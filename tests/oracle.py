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

import ml_dtypes
import numpy as np
import torch
from oracle_axes import BLOCKWISE, ROWWISE, AxisMethod, axis_product, power_of_two_scale, row_lookup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fp8fx

E4M3FN, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
EXACT = 100.0  # dB
LARGEST = {E4M3FN: 448.0, E5M2: 57344.0}


@dataclass(frozen=True)
class Role:
    """How one tensor is rounded. `scaled`: by its own amax. `saturate`: what is too large becomes the largest, else inf or NaN."""

    format: Any
    scaled: bool
    saturate: bool
    power_of_two: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The rounded values of `x`, in its dtype."""
        codes, scale = self.codes(x)
        return codes * scale

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values on the format's grid and the scale they are multiplied with, both in the dtype of `x`."""
        largest = np.float32(LARGEST[self.format])
        values = x.detach().to(torch.float32).numpy()
        scale = np.float32(1)
        if self.scaled:
            finite = np.abs(values[np.isfinite(values)])
            amax = finite.max() if finite.size else np.float32(0)
            scale = np.maximum(amax, np.float32(1e-12)) / largest
            if self.power_of_two:
                scale = power_of_two_scale(amax, LARGEST[self.format])
        with np.errstate(all="ignore"):
            scaled = values * (np.float32(1) / scale)
            if self.saturate:
                scaled = np.where(np.isnan(scaled), scaled, np.clip(scaled, -largest, largest))
            codes = scaled.astype(self.format).astype(np.float32)
        return torch.from_numpy(codes).to(x.dtype), torch.tensor(scale, dtype=x.dtype)


@dataclass(frozen=True)
class Method:
    """One training method: a Role or None (not rounded) for each tensor of Y = X W^T, dX = dY W, dW = dY^T X."""

    input: Role
    weight: Role
    output: Role | None
    grad_output: Role
    grad_input: Role | None
    grad_weight: Role | None
    axes: AxisMethod | None = None  # of linears, matmuls and embeddings; the roles above are then those of convolutions


def _power_of_two(format: Any, saturate: bool = True) -> Role:
    return Role(format, scaled=True, saturate=saturate, power_of_two=True)


_FORWARD, _GRADIENT = Role(E5M2, scaled=False, saturate=True), Role(E5M2, scaled=False, saturate=False)
_SCALED = Role(E4M3FN, scaled=True, saturate=True)
_PER_TENSOR = (_power_of_two(E4M3FN), _power_of_two(E4M3FN), None, _power_of_two(E5M2, saturate=False), None, None)
METHODS = {
    "hybrid": Method(_SCALED, _SCALED, None, Role(E5M2, scaled=True, saturate=False), None, None),
    "direct": Method(_FORWARD, _FORWARD, _FORWARD, _GRADIENT, _GRADIENT, _GRADIENT),
    "rowwise": Method(*_PER_TENSOR, ROWWISE),
    "blockwise": Method(*_PER_TENSOR, BLOCKWISE),
}


def method_of(recipe: Any) -> Method:
    """The method a recipe starts from: one of METHODS, or any recipe whose defaults name a mode or a granularity of one."""
    defaults = fp8fx.Recipe.load(recipe).to_dict()["defaults"]
    blocks = (defaults.get("input") or {}).get("granularity", "tensor")
    return METHODS[defaults["mode"] if blocks == "tensor" else "rowwise" if blocks == "row" else "blockwise"]


class _Product(torch.autograd.Function):
    """Any bilinear product: forward at the rounded operands, backward with rounded dY at the same rounded operands.

    Codes are multiplied, and the product by the scales: in float32 too that rounds no operand a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor], roles: tuple[Role, Role], method: Method
    ) -> Tensor:
        (left, scale_left), (right, scale_right) = roles[0].codes(a), roles[1].codes(b)
        with torch.enable_grad():
            ctx.codes = (left.requires_grad_(), right.requires_grad_())
            ctx.result = product(*ctx.codes)
        ctx.scales, ctx.method = (scale_left, scale_right), method
        return ctx.result.detach() * (scale_left * scale_right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        method: Method = ctx.method
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        found: list[Tensor | None] = [None, None]
        with torch._C.DisableTorchFunction():  # the mode may still be on: what follows is the oracle's own arithmetic
            dy, scale = method.grad_output.codes(grad)
            grads = torch.autograd.grad(ctx.result, [ctx.codes[i] for i in wanted], dy, retain_graph=True)
            for i, g in zip(wanted, grads, strict=True):
                role = (method.grad_input, method.grad_weight)[i]
                g = g * (scale * ctx.scales[1 - i])
                found[i] = g if role is None else role(g)
        return (*found, None, None, None)


class _Lookup(torch.autograd.Function):
    """Rows of a rounded table; dY is rounded, then summed per row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, lookup: Callable[[Tensor], Tensor], method: Method) -> Tensor:
        with torch.enable_grad():
            ctx.table = method.weight(table).requires_grad_()
            ctx.result = lookup(ctx.table)
        ctx.method = method
        return ctx.result.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        method: Method = ctx.method
        with torch._C.DisableTorchFunction():
            dy, scale = method.grad_output.codes(grad)
            (summed,) = torch.autograd.grad(ctx.result, ctx.table, dy, retain_graph=True)
            summed = summed * scale
            return summed if method.grad_weight is None else method.grad_weight(summed), None, None


class _Output(torch.autograd.Function):
    """A rounded output; the gradient passes as it is, since dY is rounded where it enters the products."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, role: Role) -> Tensor:
        return role(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


_product: Callable[..., Tensor] = _Product.apply
_lookup: Callable[..., Tensor] = _Lookup.apply
_output: Callable[..., Tensor] = _Output.apply


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
        handler = _grouped_mm if str(func) == GROUPED else HANDLERS.get(func)
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
                y = _product(a, b, function, (method.input, method.input if activations else method.weight), method)
            y = y if bias is None else y + bias
            return (y if method.output is None else _output(y, method.output)).to(out)


def _linear(oracle: Oracle, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return oracle.product("linear", input, weight, F.linear, bias)


def _matmul(op: str) -> Callable[..., Tensor]:
    def run(
        oracle: Oracle, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None, tensor2: Tensor | None = None
    ) -> Tensor:
        b = next(x for x in (other, mat2, tensor2) if x is not None)
        if input.dim() < 2 or b.dim() < 2:
            return torch.matmul(input, b)
        return oracle.product(op, input, b, torch.matmul)

    return run


def _addmm(oracle: Oracle, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and input.dim() == 1 and isinstance(mat2, nn.Parameter):
        return oracle.product("linear", mat1, mat2, torch.matmul, input)
    return beta * input + alpha * oracle.product("matmul", mat1, mat2, torch.matmul)


def _baddbmm(oracle: Oracle, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = alpha * oracle.product("bmm", batch1, batch2, torch.bmm)
    return product if beta == 0 else beta * input + product


def _convolution(op: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(oracle: Oracle, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        column = None if bias is None else bias.reshape(-1, *[1] * (weight.dim() - 2))
        return oracle.product(op, input, weight, lambda x, w: function(x, w, None, *args, **kwargs), column)

    return run


def grouped_product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Each group of rows by its own matrix; `offs` holds where groups end, the last at the last row."""
    ends = [0, *offs.tolist()]
    return torch.cat([x[ends[e] : ends[e + 1]] @ w[e] for e in range(len(w))])


GROUPED = "transformers.grouped_mm_fallback"  # an operator, registered once transformers' experts are imported


def _grouped_mm(oracle: Oracle, input: Tensor, mat2: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    return oracle.product("grouped_mm", input, mat2, lambda x, w: grouped_product(x, w, offs))


def _embedding(oracle: Oracle, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def lookup(table: Tensor) -> Tensor:
        return F.embedding(input, table, *args, **kwargs)

    method = oracle._method("embedding", weight)
    if method is None or method.axes is BLOCKWISE:
        return lookup(weight)
    return _lookup(weight, lookup, method) if method.axes is None else row_lookup(weight, input, method.axes)


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul("matmul"),
    Tensor.matmul: _matmul("matmul"),
    Tensor.__matmul__: _matmul("matmul"),
    Tensor.__rmatmul__: lambda oracle, b, a: _matmul("matmul")(oracle, a, b),
    torch.mm: _matmul("matmul"),
    Tensor.mm: _matmul("matmul"),
    torch.bmm: _matmul("bmm"),
    Tensor.bmm: _matmul("bmm"),
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch._grouped_mm: _grouped_mm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    F.embedding: _embedding,
    **{getattr(torch, name): _convolution(name, getattr(torch, name)) for name in ("conv1d", "conv2d", "conv3d")},
    **{
        getattr(torch, name): _convolution(name, getattr(torch, name))
        for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    },
}


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
