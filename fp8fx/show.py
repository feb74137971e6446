"""A graph as text that a person can read: one line per call, results named after what they hold.

    inputs: x [4, 16], up_weight [32, 16], up_bias [32], fp8_meter
    q_x, s_x = quantize(x, 'e4m3fn/current/tensor')
    y_up = linear(x, up_weight, up_bias, input=[q_x, s_x], weight=[q_up_weight, s_up_weight], meter=fp8_meter[0], site='up', ...)

`listing(module)` is the short form: it leaves out what is None, what another line says already, and in specs the usual
`nearest_even` and `saturate`. `listing(module, full=True)` prints every argument of every call, each call on one line.
"""

from __future__ import annotations

import operator
import re
import textwrap
from typing import Any

import torch
from torch import fx

from fp8fx.capture.graph import MODULE, SITE, TENSOR_NAME, tensor
from fp8fx.errors import ModelError
from fp8fx.passes.contract import SCALES, Slot, decision, is_fp8
from fp8fx.passes.lower import PARTS, WEIGHTS, WeightInput
from fp8fx.spec import GEMMS, ROLES

WIDTH = 120  # of the short form; longer lines continue indented

# Prefixes of the names of an operator's outputs, where it has several.
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "quantize": ("q_", "s_", "amax_"),
    "layer_norm_quantize": ("", "q_", "s_", "amax_", "mean_", "rstd_"),
    "linear_quantize": ("y_", "q_y_", "s_y_", "amax_y_"),
    "act": ("y_", "q_gate_", "s_gate_", "q_up_", "s_up_"),
    "mlp": ("y_", "h_", "q_", "s_", "amax_"),
    "cast": ("q_", "qt_"),
    "cast_current": ("q_", "qt_", "s_", "st_"),
    "act_linear": ("a_", "q_a_", "qt_a_", "s_a_", "h_", "u_"),
    "norm_cast": ("", "sum_", "q_", "qt_", "s_", "mean_", "rstd_"),
}
# Arguments that other lines say already: an operand's spec stands where it is quantized.
_IMPLIED = ("input_spec", "weight_spec", "left_spec", "right_spec", "input1_spec", "weight1_spec", "weight2_spec", "role")


def listing(module: fx.GraphModule, *, full: bool = False) -> str:
    """The graph of `module` as text, in order of execution. `full`: every argument of every call, and no line is broken.

    Raises ModelError for anything else, such as a compiled model, which may have several graphs.
    """
    if not isinstance(module, fx.GraphModule):
        raise ModelError(
            f"fp8fx.listing takes a graph, got {type(module).__name__}; of a compiled model that was called: "
            "fp8fx.listing(fast.graph('insert_qdq')), and fast.graph(stage, 1) for its next graph"
        )
    return _Printer(module, full).text()


class _Printer:
    """Names every node first, then prints them."""

    def __init__(self, module: fx.GraphModule, full: bool) -> None:
        self.full = full
        self.nodes = list(module.graph.nodes)
        self.weights: list[WeightInput] = module.meta.get(WEIGHTS, [])
        self.scales: list[Slot] = module.meta.get(SCALES, [])
        self.taken: set[str] = set()
        self.names: dict[fx.Node, str] = {}
        for node in self.nodes:
            self.names[node] = self._name(node)

    def text(self) -> str:
        lines = self._inputs()
        for node in self.nodes:
            if node.op != "placeholder" and not self._is_output(node):
                lines += self._wrapped(self._line(node)) + self._remarks(node)
        return "\n".join(lines) + "\n"

    # -- names ----------------------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._free(node.name)
        if self._is_output(node) and node.target is operator.getitem:
            source, index = node.args
            if source.target is torch.unbind:  # type: ignore[union-attr]
                return f"{self._text(source.args[0])}[{index}]"  # type: ignore[union-attr]
            return self._free(_OUTPUTS[_operator(source)][index] + self._subject(source))  # type: ignore[index,arg-type]
        if is_fp8(node) and _operator(node) in _OUTPUTS:
            return node.name  # its outputs have the names
        if site := _site(node):
            return self._free("y_" + _identifier(site))
        if is_fp8(node) and _operator(node) in ("dequantize", "anchor"):
            return self._free(f"{self._text(node.args[0])}_{_operator(node)}d".replace("anchord", "anchor"))
        return self._free(node.name)

    def _subject(self, node: fx.Node) -> str:
        """What the outputs are named after: the quantized tensor, the norm's module, or the site."""
        if _operator(node) in ("quantize", "cast", "cast_current"):
            return _identifier(self._text(node.args[0]))
        if _operator(node) in ("layer_norm_quantize", "norm_cast"):
            return _identifier(node.meta.get(MODULE, "")) or node.name
        return _identifier(_site(node))

    def _free(self, name: str) -> str:
        found, k = name, 0
        while found in self.taken:
            k += 1
            found = f"{name}_{k}"
        self.taken.add(found)
        return found

    def _is_output(self, node: fx.Node) -> bool:
        """An output of a call with several, or the call that cuts the meter into rows: printed with the line that has them."""
        if node.target is torch.unbind:
            return all(user.target is operator.getitem for user in node.users)
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, fx.Node):
            return False
        return is_fp8(source) or (source.target is torch.unbind and self._is_output(source))

    # -- lines ----------------------------------------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        parts = [[f"fp8_weight_{i}_{part}" for part in PARTS] for i in range(len(self.weights))]
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        inputs = [node for node in placeholders if not any(node.name in names for names in parts)]
        if self.full:
            lines = [f"{node.name} = input{_shape(node)}{_parameter(node)}" for node in inputs]
        else:
            lines = self._wrapped("inputs: " + ", ".join(node.name + _shape(node) for node in inputs))
        for i, weight in enumerate(self.weights):
            subject = weight.placeholder + "".join(f".{getattr(view, '__name__', view)}()" for view, _ in weight.views)
            arguments = [subject, repr(self._spec(weight.spec)), *([str(list(weight.dims))] if self._dims(weight.spec) else [])]
            if weight.slot is not None:
                arguments.append(f"scale=fp8_scales[{self.scales.index(weight.slot)}]")
            given = [node.name for node in placeholders if node.name in parts[i]]
            line = f"inputs: {', '.join(given)} = quantize({', '.join(arguments)})"
            lines += [line] if self.full else self._wrapped(line)
        return lines

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._text(node.args[0])}"
        return f"{self._targets(node)} = {self._call(node)}"

    def _wrapped(self, line: str) -> list[str]:
        if self.full:
            return [line]
        together = re.sub(r" ?\[[^\[\]]*\]", lambda found: found.group().replace(" ", "\0"), line)  # lists and shapes stay on a line
        lines = textwrap.wrap(together, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        return [text.replace("\0", " ") for text in lines]

    def _targets(self, node: fx.Node) -> str:
        prefixes = _OUTPUTS.get(_operator(node)) if is_fp8(node) else None
        if prefixes is None:
            return self.names[node]
        outputs = {user.args[1]: self.names[user] for user in node.users}
        last = max((i for i in outputs if isinstance(i, int)), default=0)
        shown = [outputs.get(i, "_") for i in range(last + 1)]
        return ", ".join(shown if last + 1 == len(prefixes) or (last and not self.full) else [*shown, "*_"])

    def _call(self, node: fx.Node) -> str:
        if is_fp8(node):
            return f"{_operator(node)}({', '.join(self._arguments(node))})"
        positional = [self._text(a) for a in node.args]
        named = [f"{key}={self._text(a)}" for key, a in node.kwargs.items()]
        if node.op == "call_method":
            return f"{positional[0]}.{node.target}({', '.join([*positional[1:], *named])})"
        name = str(node.target) if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))
        return f"{name}({', '.join([*positional, *named])})"

    def _arguments(self, node: fx.Node) -> list[str]:
        shown: list[str] = []
        named = False  # once an argument is left out, those after it need their names
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):  # type: ignore[union-attr]
            text = self._text(value) if self.full else self._argument(node, argument.name, value)
            named = named or self.full or not text or len(shown) == 3 or isinstance(value, (list, tuple))
            if text:
                shown.append(f"{argument.name}={text}" if named else text)
        return shown

    def _argument(self, node: fx.Node, name: str, value: Any) -> str:
        """An argument in the short form; "" leaves it out."""
        if name.startswith("backward"):
            return self._backward(str(value))
        unrandom = name == "site" and _operator(node) in ("quantize", "layer_norm_quantize") and None in node.args[3:8]
        useless_dims = name == "dims" and not self._dims(str(next(a for a in node.args if isinstance(a, str))))
        if value is None or value == [] or value == "" or value is torch.float32 or name in _IMPLIED or unrandom or useless_dims:
            return ""
        return self._text(value)

    def _backward(self, text: str) -> str:
        """`'grad_output=grad_input=e5m2/none/tensor'`: roles with one spec together, and GEMMs only if not all run in FP8."""
        roles: dict[str, list[str]] = {}
        for key, value in (part.split("=", 1) for part in text.split(";")):
            if (key, value) != ("gemms", ",".join(GEMMS)):
                roles.setdefault(self._spec(value), []).append(key)
        return repr(";".join(f"{'='.join(keys)}={value}" for value, keys in roles.items())) if roles else ""

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self._text(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return repr(self._spec(value) if isinstance(value, str) else value)

    def _spec(self, text: str) -> str:
        """A spec; in the short form without what almost every spec says."""
        return text if self.full else text.replace("/nearest_even", "").replace("/saturate", "")

    def _dims(self, spec: str) -> bool:
        """The contracted dimensions are worth printing: only scales per row depend on them."""
        return self.full or "/row" in spec

    def _remarks(self, node: fx.Node) -> list[str]:
        made = decision(node)
        if made is None:
            return [f"    # site {node.meta[SITE]!r}"] if SITE in node.meta and not is_fp8(node) else []
        text = f"site {made.name!r}: {made.mode} ({made.reason})"
        if made.spec is not None:
            roles = [f"{role} {self._spec(spec.text)}" for role in ROLES if (spec := getattr(made.spec, role)) is not None]
            gemms = [] if set(made.spec.gemms) == set(GEMMS) else [f"only these GEMMs: {', '.join(made.spec.gemms) or 'none'}"]
            text += ": " + ", ".join(roles + gemms)
        lines = [text] if self.full else textwrap.wrap(text, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
        return [f"    # {line}" for line in lines]


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("fp8fx.").removesuffix(".default")


def _site(node: fx.Node) -> str:
    """The site a node is or belongs to; of a compound operator the last. "" for a node that belongs to none."""
    if not is_fp8(node):
        return str(node.meta.get(SITE, ""))
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {argument.name: value for argument, value in zip(schema, node.args, strict=False) if argument.name in ("site", "site2")}
    return str(found.get("site2") or found.get("site") or "")


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _shape(node: fx.Node) -> str:
    value = tensor(node)
    if value is None:
        return ""
    dtype = "" if value.dtype is torch.float32 else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{dtype} {list(value.shape)}"


def _parameter(node: fx.Node) -> str:
    name = node.meta.get(TENSOR_NAME)
    return f"  # {name}" if name else ""
