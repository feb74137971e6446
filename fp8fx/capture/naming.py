"""Canonical names: the dotted path of the module that made a node, and the name of every site.

A name never comes from the argument names of the frame that was captured (`L['self']`, `L['block']`): after a graph break that
frame is somewhere inside the model. It comes from the parameters, whose names in the root model are known by identity.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable

from torch import fx, nn
from torch.nn.utils import parametrize

from fp8fx.capture.graph import ALIASES, MODULE, SITE, TENSOR_NAME
from fp8fx.capture.sites import SiteCall, read_site, unsupported

_BASE = re.compile(r"^(?:L|G)\['[^']*'\](?:\.__self__)?")  # torch.nn's methods are compiled as L['fn'].__self__
_ITEM = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]")


def split_source(source: str) -> tuple[str, str]:
    """`L['s']._modules['blocks']._modules['0']._parameters['weight']` -> (`L['s']`, `blocks.0.weight`)."""
    found = _BASE.match(source)
    if found is None:
        return "", source
    rest = _ITEM.sub(lambda m: "." + (m.group(1) or m.group(2) or m.group(3)), source[found.end() :])
    return found.group(0), rest.removeprefix(".")


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


class RootNames:
    """The names of a root model's tensors and modules, by identity; a tied tensor or shared module has several."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self._tensors: dict[int, list[str]] = {}
        for name, value in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
            self._tensors.setdefault(id(value), []).append(name)
        self._module_names: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            self._module_names.setdefault(id(module), []).append(name)

    def of_tensor(self, value: object) -> list[str]:
        return self._tensors.get(id(value), [])

    def of_module(self, module: object) -> str | None:
        """The canonical name, which is the first."""
        return next(iter(self._module_names.get(id(module), [])), None)

    def of_path(self, path: str) -> list[str]:
        """All names of the module that `path` names, the canonical one first."""
        return self._module_names.get(id(self.modules.get(path)), [path])

    def prefix(self, pairs: Iterable[tuple[str, list[str]]]) -> str | None:
        """The path of a frame's base, from (suffix in the frame, names in the root) of the parameters it uses.

        Tied tensors have several names; the prefix that explains most parameters wins, the shortest of equals.
        """
        votes: Counter[str] = Counter()
        for suffix, names in pairs:
            for name in names:
                if name == suffix:
                    votes[""] += 1
                elif suffix and name.endswith("." + suffix):
                    votes[name[: -len(suffix) - 1]] += 1
        return min(votes, key=lambda prefix: (-votes[prefix], len(prefix))) if votes else None


def weight_source(node: object) -> fx.Node | None:
    """The parameter's placeholder behind a weight operand, looking through views of it (`weight.t()`)."""
    seen = node
    while isinstance(seen, fx.Node) and seen.op == "call_method" and seen.target in ("t", "transpose", "contiguous", "view"):
        seen = seen.args[0]  # type: ignore[assignment]
    return seen if isinstance(seen, fx.Node) and seen.op == "placeholder" and seen.meta.get(TENSOR_NAME) else None


def _layer_name(call: SiteCall, names: RootNames) -> str | None:
    """The name of the layer whose weight this is: the innermost module if it owns the weight, else the parameter's own name."""
    path = call.node.meta.get(MODULE, "")
    module = names.modules.get(path)
    source = weight_source(call.w)
    if source is None:
        return path if path and module is not None and _is_layer(module) and _has_weight(module) else None
    name: str = source.meta[TENSOR_NAME]
    for attribute, value in (module._parameters if module is not None else {}).items():
        if value is not None and name in names.of_tensor(value):
            return path if attribute == "weight" else join(path, attribute)
    return name.removesuffix(".weight")


def _has_weight(module: nn.Module) -> bool:
    """Asked without reading it: to read a parametrized weight is to compute it, which moves spectral_norm's own state."""
    return module._parameters.get("weight") is not None or parametrize.is_parametrized(module, "weight")


def _is_layer(module: nn.Module | None) -> bool:
    """A module whose own weight is computed on the way (parametrized, standardized) is still that layer."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding)
    return isinstance(module, kinds)


def _reads_own_table(node: fx.Node, names: RootNames) -> bool:
    """An embedding that looks rows up by indexing its own weight: a layer, though it calls no function that says so."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    table, path = node.args[0], node.meta.get(MODULE, "")
    module = names.modules.get(path)
    if not isinstance(module, nn.Embedding) or not isinstance(table, fx.Node) or table.op != "placeholder":
        return False
    return table.meta.get(TENSOR_NAME) in names.of_tensor(module.weight)


class Numbering:
    """Numbers functional sites over all graphs of one model: the second graph of a broken block goes on where the first ended.

    A frame that is captured again (other shapes, no_grad) must get the numbers it had: `key` says which frame it is.
    """

    def __init__(self) -> None:
        self._total: Counter[str] = Counter()
        self._starts: dict[object, Counter[str]] = {}

    def start(self, key: object) -> Counter[str]:
        return self._starts.setdefault(key, self._total.copy()).copy()

    def finish(self, counts: Counter[str]) -> None:
        self._total |= counts


def assign_site_names(graph: fx.Graph, names: RootNames, counts: Counter[str]) -> None:
    """Write meta["site"] on every node that multiplies: a layer's path, else `<module path>.<op>[_k]` in execution order.

    `counts` holds, and takes on, how many functional sites each `<module path>.<op>` has so far. A module that the model holds under
    several names is one module, whichever name its caller used: meta["module"] becomes the first, meta["aliases"] holds the others.
    """
    for node in graph.nodes:
        node.meta[MODULE], *others = names.of_path(node.meta.get(MODULE, ""))
        call = read_site(node)
        if call is None and unsupported(node) is None and not _reads_own_table(node, names):
            continue
        layer = _layer_name(call, names) if call is not None and call.op != "attention" else None
        if node.op == "call_module":
            layer = str(node.target)
        elif call is None and node.target is operator.getitem:
            layer = node.meta[MODULE]
        if not layer:
            op = call.op if call is not None else str(getattr(node.target, "__name__", node.target))
            layer = join(node.meta[MODULE], op)
            k = counts[layer]
            counts[layer] += 1
            layer = layer if k == 0 else f"{layer}_{k}"
        node.meta[SITE] = layer
        node.meta[ALIASES] = tuple(_renamed(layer, node.meta[MODULE], other) for other in others)


def _renamed(site: str, path: str, other: str) -> str:
    """The name of `site` where its module is called `other` instead of `path`."""
    return join(other, site.removeprefix(path).removeprefix(".")) if f"{site}.".startswith(f"{path}.") else site
