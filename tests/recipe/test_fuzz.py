"""Whatever is written, the answer is a recipe or a RecipeError; and a recipe that loads also resolves, or says why not."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe.test_recipe import meaning

from fp8fx.errors import RecipeError
from fp8fx.recipe import Recipe, Site
from fp8fx.recipe.grammar import Document, Layer, Match, Role, Rule
from fp8fx.recipe.sections import LossScaling
from fp8fx.recipe.source import from_text
from fp8fx.recipe.values import OPS

KEYS = sorted({key for model in (Document, Layer, Role, Rule, Match, LossScaling) for key in model.model_fields})
WORDS = ["none", "direct", "hybrid", "exempt", "e4m3fn", "e5m2", "e4m3", "current", "delayed", "row", "fp8", "stochastic", "saturate", "fc"]
WORDS += ["nonfinite", "dynamic", "*", "re:.*", "re:(", "1e-12", "on", *OPS[:3]]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    scalars | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3) | st.integers(-1, 3), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=12,
)
SITES = [Site(name="fc", op="linear", types=("Linear",), numel=4, has_weight=True), Site(name="a.matmul", op="matmul")]

roles = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["e4m3fn", "e5m2", "e3m4fn"]),
        "scaling": st.sampled_from(["none", "current"]),
        "granularity": st.sampled_from(["tensor", "row", [1, 128]]),
        "rounding": st.sampled_from(["nearest_even", "stochastic"]),
    },
)
layers = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["direct", "hybrid", "exempt"]),
        "input": roles,
        "output": roles,
        "grad_output": roles,
        "rounding": st.sampled_from(["up", "nearest_even"]),
        "overflow": st.sampled_from(["saturate", "nonfinite"]),
    },
)
matches = st.sampled_from(["fc", "*", {"op": "matmul"}])
rules = st.lists(st.builds(lambda layer, match: {"match": match, **layer}, layers, matches), max_size=3)
documents = st.fixed_dictionaries({}, optional={"defaults": layers, "rules": rules, "strict": st.booleans()})


def load_or_refuse(source: Any) -> Recipe | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            recipe = Recipe.load(source)
        except RecipeError:
            return None
        with contextlib.suppress(RecipeError):
            recipe.check_names({"": ("Module",), "fc": ("Linear",)})
            recipe.resolve(SITES)
        assert Recipe.load(recipe.to_dict()) == recipe
        return recipe


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(values)
def test_garbage(value: Any) -> None:
    load_or_refuse(value)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(sorted(Document.model_fields)), values, max_size=4))
def test_garbage_under_known_keys(value: dict[str, Any]) -> None:
    load_or_refuse(value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet="ab:{}[],&*!-'\"\n\t #<|>?%@`1e.~", max_size=30))
def test_garbage_text(text: str) -> None:
    with contextlib.suppress(RecipeError):
        load_or_refuse(from_text(text, "fuzz", Path()).data)


@settings(max_examples=150, deadline=None)
@given(documents, documents)
def test_valid_recipes_round_trip_and_extend(base: dict[str, Any], top: dict[str, Any]) -> None:
    """YAML carries everything; a dumped recipe can be extended like the one it was dumped from."""
    recipe = load_or_refuse(base)
    if recipe is None:
        return
    top.pop("strict", None)  # strictness reaches into the extended file, where a dump has nothing left to complain about
    assert load_or_refuse(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text(yaml.safe_dump(base))
        recipe.dump(Path(folder) / "dumped.yaml")
        one, two = (load_or_refuse({"extends": f"{folder}/{name}.yaml", **top}) for name in ("base", "dumped"))
    assert decisions(one) == decisions(two)


def decisions(recipe: Recipe | None) -> Any:
    """What a recipe does to the sites, wherever its rules stand, or that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return recipe and meaning(recipe, SITES)
        except RecipeError:
            return "refused"
