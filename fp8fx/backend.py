"""The `torch.compile` backend "fp8fx", found through the entry-point group `torch_dynamo_backends`.

    torch.compile(model, backend="fp8fx", options={"recipe": "hybrid", "inner": "inductor"})

The same passes, the same plan and the same numbers as `fp8fx.compile`. What differs: the model is captured in place, and state
that belongs to a model (position in the random stream, delayed scales, kept weights) is kept beside it and not copied with it;
`fp8fx.state_dict` and `fp8fx.load_state_dict` save and restore it.
`fp8fx.plan` and `fp8fx.invalidate` take what torch.compile returned.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fp8fx.capture.dynamo import compiled_module, guard_module
from fp8fx.capture.layers import module_types
from fp8fx.capture.sites import fused_inference
from fp8fx.clone import IN_PLACE
from fp8fx.errors import CaptureError, FP8Warning, ModelError, RecipeError, allowed, nearest
from fp8fx.options import Options
from fp8fx.recipe import Recipe
from fp8fx.runtime import Runtime

_FASTPATH = (
    "fp8fx: torch runs an attention module as one fused inference kernel, in high precision. Call "
    "torch.backends.mha.set_fastpath_enabled(False) before the model, or use fp8fx.compile, which does"
)
_OPTIONS = ("recipe", "exempt", "output_fused", "inner", "inner_mode")


def fp8fx(module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """What torch.compile calls with each captured graph. `options`: recipe, exempt, output_fused, inner, inner_mode."""
    given = _checked(kwargs)
    recipe = Recipe.load(given.pop("recipe", "hybrid")).with_overrides(given.pop("exempt", ()), given.pop("output_fused", ()))
    made = Options(**given)
    made.check()
    runtime = _runtime(recipe, made)
    if any(fused_inference(node) for node in module.graph.nodes):  # chosen before a backend is asked; fp8fx.compile switches it off
        warnings.warn(_FASTPATH, FP8Warning, stacklevel=2)
    graph = runtime.backend(module, example_inputs)
    return graph if guard_module() else _ByCaller(module, recipe, made, runtime.root, graph)


class _ByCaller:
    """A graph of a frame that holds no module, such as the rest of a forward behind a graph break: nothing there can be guarded on.

    Dynamo runs it for every model of a class; the model that called is found up the stack.
    """

    def __init__(self, module: fx.GraphModule, recipe: Recipe, options: Options, root: nn.Module, graph: Callable[..., Any]) -> None:
        self.module, self.recipe, self.options = module, recipe, options
        self.graphs: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary({root: graph})

    def __call__(self, *args: Any) -> Any:
        root = compiled_module()
        if root is None:
            raise CaptureError("the compiled model this graph belongs to is gone")
        if root not in self.graphs:
            self.graphs[root] = _runtime(self.recipe, self.options).backend(self.module, args)
        return self.graphs[root](*args)


def _checked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    extra = set(kwargs) - {"options"}
    if extra:
        raise ModelError(
            f"the fp8fx backend takes options=..., not {allowed(sorted(extra))}; an Inductor mode goes into options={{'inner_mode': ...}}"
        )
    options = dict(kwargs.get("options") or {})
    for key in options:
        if key not in _OPTIONS:
            raise RecipeError(f"options: unknown key {key!r}; allowed are {allowed(_OPTIONS)}.{nearest(key, _OPTIONS)}")
    return options


def _runtime(recipe: Recipe, options: Options) -> Runtime:
    """The Runtime of the model being captured, made at its first graph."""
    root = compiled_module()
    if root is None:
        raise CaptureError("the fp8fx backend compiles modules: torch.compile a torch.nn.Module or a method of one, not a plain function")
    key = (recipe, options)
    made = IN_PLACE.setdefault(root, {})
    if key not in made:
        recipe.check_names(module_types(root))
        made[key] = Runtime(recipe, options)
        made[key].attach(root)
    runtime: Runtime = made[key]
    return runtime
