"""Which nodes multiply: a table from torch functions to sites, with their arguments in one form.

A new kind of site is one row of `SITES` and one reader. What multiplies and has no row of its own is in `UNSUPPORTED`, so that
the plan lists it: nothing is skipped silently.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fp8fx.capture.graph import hints, tensor

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass
class SiteCall:
    """One site in one form. `x`: the first operand (for an embedding the index). `w`: the second, or the weight.

    `transposed_weight`: w is [K, N] instead of [N, K] (torch.addmm). `add`: (tensor, beta, alpha) of addmm-like calls.
    """

    node: fx.Node
    op: str
    x: Any
    w: Any
    bias: Any = None
    transposed_weight: bool = False
    add: tuple[Any, float, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward GEMM (a multiply-add is two); 0 for an embedding."""
        return _flops(self)

    @property
    def shape(self) -> str:
        """What the plan prints: M x N x K, or the convolution's shapes."""
        return _shape(self)


def _bind(node: fx.Node, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    bound = dict(defaults)
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def _linear(node: fx.Node) -> SiteCall:
    a = _bind(node, ("input", "weight", "bias"), {"bias": None})
    return SiteCall(node, "linear", a["input"], a["weight"], a["bias"])


def _matmul(node: fx.Node) -> SiteCall:
    a = _bind(node, ("input", "other"), {})
    other = a.get("other", a.get("mat2"))
    return SiteCall(node, "matmul", a["input"], other)


def _bmm(node: fx.Node) -> SiteCall:
    call = _matmul(node)
    call.op = "bmm"
    return call


def _addmm(node: fx.Node) -> SiteCall:
    a = _bind(node, ("input", "mat1", "mat2"), {"beta": 1, "alpha": 1})
    bias = tensor(a["input"])
    if a["beta"] == 1 and a["alpha"] == 1 and bias is not None and bias.dim() == 1 and _is_weight(a["mat2"]):
        return SiteCall(node, "linear", a["mat1"], a["mat2"], a["input"], transposed_weight=True)
    return SiteCall(node, "matmul", a["mat1"], a["mat2"], add=(a["input"], a["beta"], a["alpha"]))


def _baddbmm(node: fx.Node) -> SiteCall:
    a = _bind(node, ("input", "batch1", "batch2"), {"beta": 1, "alpha": 1})
    return SiteCall(node, "bmm", a["batch1"], a["batch2"], add=(a["input"], a["beta"], a["alpha"]))


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and bool(node.meta.get("tensor_name"))


def _conv(dims: int) -> Callable[[fx.Node], SiteCall]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def read(node: fx.Node) -> SiteCall:
        a = _bind(node, names, {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
        options = {key: _tuple(a[key], dims) for key in ("stride", "padding", "dilation")}
        options |= {"transposed": False, "output_padding": (0,) * dims, "groups": a["groups"]}
        return SiteCall(node, f"conv{dims}d", a["input"], a["weight"], a["bias"], options=options)

    return read


def _conv_transpose(dims: int) -> Callable[[fx.Node], SiteCall]:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

    def read(node: fx.Node) -> SiteCall:
        a = _bind(node, names, {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1})
        options = {key: _tuple(a[key], dims) for key in ("stride", "padding", "dilation", "output_padding")}
        options |= {"transposed": True, "groups": a["groups"]}
        return SiteCall(node, f"conv_transpose{dims}d", a["input"], a["weight"], a["bias"], options=options)

    return read


def _tuple(value: Any, dims: int) -> Any:
    """An int, a 1-tuple or a full tuple as a full tuple; the strings "same" and "valid" as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return (value,) * dims


def _embedding(node: fx.Node) -> SiteCall:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    a = _bind(node, names, {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False})
    options = {key: a[key] for key in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")}
    return SiteCall(node, "embedding", a["input"], a["weight"], options=options)


def _grouped_mm(node: fx.Node) -> SiteCall:
    """Groups of rows, each by a matrix of its own: the experts of a mixture. Without offsets it is a bmm by another name."""
    names = ("input", "mat2", "offs", "bias", "out_dtype")
    a = _bind(node, names, {"offs": None, "bias": None, "out_dtype": None})
    x, w = a.get("mat_a", a.get("self", a.get("input"))), a.get("mat_b", a.get("weight", a.get("mat2")))
    extra = a["bias"] is not None or a["out_dtype"] is not None
    if a["offs"] is None and not extra:
        return SiteCall(node, "bmm", x, w)
    return SiteCall(node, "grouped_mm", x, w, options={"offs": a["offs"], "extra": extra})


def _attention(node: fx.Node) -> SiteCall:
    a = _bind(node, ("query", "key", "value"), {})
    return SiteCall(node, "attention", a["query"], a["key"], options={"value": a["value"]})


SITES: dict[Any, Callable[[fx.Node], SiteCall]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.linalg.matmul: _matmul,
    operator.matmul: _matmul,
    operator.imatmul: _matmul,  # a tensor has no product in place: `x @= w` is `x = x @ w`
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    torch.bmm: _bmm,
    "bmm": _bmm,
    torch.addmm: _addmm,
    "addmm": _addmm,
    torch.baddbmm: _baddbmm,
    "baddbmm": _baddbmm,
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    torch.conv_transpose1d: _conv_transpose(1),
    torch.conv_transpose2d: _conv_transpose(2),
    torch.conv_transpose3d: _conv_transpose(3),
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
}

for _home in (torch, F):
    for _name in ("_grouped_mm", "grouped_mm"):
        if hasattr(_home, _name):
            SITES[getattr(_home, _name)] = _grouped_mm

# Operators of other libraries that mean one of these, by their registered name: a library need not be there to be known.
# transformers runs experts through its own operator where the weights are not bfloat16.
OPERATORS: dict[str, Callable[[fx.Node], SiteCall]] = {"transformers::grouped_mm_fallback": _grouped_mm}

_VECTOR = "a product with a vector has no FP8 form"
_IN_PLACE = "a product that writes in place has no FP8 form"
_RECURRENT = "recurrent layers have no FP8 form"
_CHAIN = "a chain of products has no FP8 form; write it with matmul"
_FUSED = "fused inference kernels have no FP8 form; call torch.backends.mha.set_fastpath_enabled(False) first"

# What multiplies but has no FP8 form: target -> reason. A string is a method.
UNSUPPORTED: dict[Any, str] = {
    torch.einsum: "einsum has no FP8 form; write it with matmul",
    F.bilinear: "bilinear has no FP8 form",
    F.multi_head_attention_forward: "this form of multi_head_attention_forward is not expanded",
    F.embedding_bag: "embedding_bag has no FP8 form",
    torch.tensordot: "tensordot has no FP8 form; write it with matmul",
    torch.linalg.multi_dot: _CHAIN,
    torch.chain_matmul: _CHAIN,
    torch.convolution: "torch.convolution has no FP8 form; write it with conv2d or its relatives",
    torch.conv_tbc: "conv_tbc has no FP8 form; write it with conv1d",
    torch._transformer_encoder_layer_fwd: _FUSED,
    torch._native_multi_head_attention: _FUSED,
}
for _name, _why in {
    "inner": "inner has no FP8 form; write it with matmul",
    "addbmm": "addbmm has no FP8 form; write it with bmm",
    **dict.fromkeys(("mv", "addmv", "outer", "ger", "addr", "dot", "vdot"), _VECTOR),
    "matrix_power": _CHAIN,
}.items():  # these are functions and methods
    UNSUPPORTED[getattr(torch, _name)] = UNSUPPORTED[_name] = _why
UNSUPPORTED |= {torch.linalg.vecdot: _VECTOR, torch.linalg.matrix_power: _CHAIN}
UNSUPPORTED |= dict.fromkeys(("addmm_", "baddbmm_", "addbmm_", "addmv_", "addr_"), _IN_PLACE)
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
    UNSUPPORTED[getattr(torch, _name)] = _RECURRENT


def read_site(node: fx.Node) -> SiteCall | None:
    """The site this node is, or None if it does not multiply."""
    if node.op not in ("call_function", "call_method"):
        return None
    reader = SITES.get(node.target) or OPERATORS.get(_operator_name(node.target))
    return reader(node) if reader is not None else None


def _operator_name(target: Any) -> str:
    """`namespace::name` of a registered operator, overload or not; else ""."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return str(packet._qualified_op_name) if isinstance(packet, torch._ops.OpOverloadPacket) else ""


def fused_inference(node: fx.Node) -> bool:
    """Does the node hide the layers of one of torch.nn's attention modules, in evaluation without gradients?"""
    return UNSUPPORTED.get(node.target) == _FUSED


def unsupported(node: fx.Node) -> str | None:
    """The reason why a node that multiplies has no FP8 form, or None."""
    if node.op == "call_module":
        return "a module that the front end does not look into"
    return UNSUPPORTED.get(node.target) if node.op in ("call_function", "call_method") else None


def _shapes(call: SiteCall) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    x, w = tensor(call.x), tensor(call.w)
    return None if x is None or w is None else (hints(x.shape), hints(w.shape))


def _flops(call: SiteCall) -> int:
    shapes = _shapes(call)
    if shapes is None or call.op == "embedding":
        return 0
    x, w = shapes
    if call.op == "linear":
        return 2 * math.prod(x) * (w[1] if call.transposed_weight else w[0])
    if call.op in ("matmul", "bmm", "grouped_mm"):
        out = tensor(call.node)
        return 2 * math.prod(hints(out.shape)) * x[-1] if out is not None else 0
    if call.op == "attention":
        value = tensor(call.options["value"])
        depth = hints(value.shape)[-1] if value is not None else x[-1]
        return 2 * math.prod(x[:-1]) * w[-2] * (x[-1] + depth)
    if call.options["transposed"]:
        return 2 * math.prod(x) * math.prod(w[1:])
    out = tensor(call.node)
    return 2 * math.prod(hints(out.shape)) * math.prod(w[1:]) if out is not None else 0


def _shape(call: SiteCall) -> str:
    shapes = _shapes(call)
    if shapes is None:
        return ""
    x, w = shapes
    if call.op == "linear":
        n = w[1] if call.transposed_weight else w[0]
        return f"{math.prod(x[:-1])}x{n}x{x[-1]}"
    if call.op == "grouped_mm" and len(x) == 2 and len(w) == 3:
        return f"{x[0]}x{w[2]}x{x[1]} in {w[0]} groups"
    if call.op in ("matmul", "bmm"):
        batch = f"{math.prod(x[:-2])}*" if len(x) > 2 else ""
        return f"{batch}{x[-2] if len(x) > 1 else 1}x{w[-1]}x{x[-1]}"
    join = "x".join
    return f"{join(map(str, x))} * {join(map(str, w))}"
