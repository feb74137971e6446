"""The layers of a model as recipes see them: names with types, and what `boundary` may mean."""

from __future__ import annotations

from torch import fx, nn

from fp8fx.capture.graph import SITE
from fp8fx.capture.naming import weight_source
from fp8fx.capture.sites import read_site
from fp8fx.recipe.resolve import BOUNDARY_OPS


def module_types(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Dotted name -> class names of the MRO, for every module of `root`, the root as ''."""
    return {
        name: tuple(cls.__name__ for cls in type(module).__mro__ if cls not in (nn.Module, object))
        for name, module in root.named_modules(remove_duplicate=False)
    }


def boundary_layers(graph: fx.Graph) -> list[str]:
    """Names of the layers that a recipe's `boundary` may mean, in execution order."""
    calls = [call for node in graph.nodes if SITE in node.meta and (call := read_site(node)) is not None]
    return [call.node.meta[SITE] for call in calls if call.op in BOUNDARY_OPS and weight_source(call.w) is not None]
