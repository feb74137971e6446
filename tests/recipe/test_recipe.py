"""The public class: round trips, values, the shipped files, the schema and the documentation."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from fp8fx.arithmetic import Arithmetic
from fp8fx.errors import RecipeError
from fp8fx.recipe import Decision, Recipe, Site
from fp8fx.recipe.reference import SECTIONS, table
from fp8fx.spec import SiteSpec

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")

EVERYTHING: dict[str, Any] = {
    "extends": "hybrid",
    "defaults": {"mode": "direct", "input": {"granularity": "tensor"}, "output": None, "rounding": "up", "gemms": {"output": "fp8"}},
    "boundary": {"first": "exempt"},
    "rules": [
        {"match": {"type": ["A", "B"], "min_numel": 3}, "mode": "hybrid", "input": {"granularity": [1, 128]}, "optional": True},
        {"match": ["a", {"op": "linear"}], "output_fused": True, "weight": None, "reason": "why"},
    ],
    "exempt": ["fc", {"type": "Embedding"}],
    "output_fused": "conv*",
    "scale": {"power_of_two": True, "eps": "1e-10"},
    "loss_scaling": {"mode": "dynamic", "minimum": {"0": 1, 40000: 8192}},
    "seed": 7,
    "strict": "yes",
}

SOURCES: list[Any] = [*Recipe.shipped(), *EXAMPLES, {}, EVERYTHING]
SITES = [Site(name=name, op="linear", types=("Linear",), numel=128, has_weight=True) for name in ("a", "b", "fc", "lm_head")]


def meaning(recipe: Recipe, sites: list[Site] = SITES, partial: bool = False) -> tuple[list[Decision], list[str]]:
    """What a recipe decides, and its notes; reasons without the places of rules, which a dump has elsewhere."""
    found = recipe.resolve(sites, partial=partial)
    return [replace(one, reason=without_place(one.reason)) for one in found.decisions], [without_place(note) for note in found.notes]


def without_place(text: str) -> str:
    return re.sub(r"^(\S+:\d+: )?(rules\[\d+\]|exempt|output_fused) ", "", text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(getattr(source, "name", source))[:30])
def test_round_trips(source: Any, tmp_path: Path) -> None:
    recipe = Recipe.load(source)
    recipe.dump(tmp_path / "mine.yaml")
    back = Recipe.load(tmp_path / "mine.yaml")
    assert back == recipe
    assert hash(back) == hash(recipe)
    assert back.to_dict() == recipe.to_dict()
    assert meaning(back, partial=True) == meaning(recipe, partial=True)
    for other in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), Recipe.load(json.loads(json.dumps(recipe.to_dict())))):
        assert other == recipe


def test_dump_is_readable(tmp_path: Path) -> None:
    Recipe.load("emulation-hybrid").dump(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert "  grad_input: {format: e5m2, scaling: none, granularity: tensor, rounding: stochastic, overflow: nonfinite}\n" in text
    assert "- {match: '*lm_head', mode: exempt, optional: true, reason: vocabulary projection}\n" in text
    with pytest.raises(RecipeError, match="cannot be written"):
        Recipe.load("none").dump(tmp_path / "no" / "such" / "folder.yaml")


def test_equality_is_by_content() -> None:
    assert Recipe.load({"extends": "hybrid"}) == Recipe.load("hybrid")
    assert Recipe.load("direct") != Recipe.load("hybrid")
    assert Recipe.load("hybrid") != "hybrid"
    assert len({Recipe.load("hybrid"), Recipe.load({"extends": "hybrid"}), Recipe.load("none")}) == 2


def test_name_origin_and_repr(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: direct\nexempt: [a, b]\n")
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.origin) == ("mine", str(path))
    assert repr(recipe) == "<Recipe mine: direct, 1 rule, 2 exempt>"
    assert Recipe.load("hybrid").name == "hybrid"
    assert Recipe.load({}).name == "<dict>"
    assert Recipe.load(recipe) is recipe


def test_sections() -> None:
    recipe = Recipe.load(EVERYTHING)
    assert recipe.loss_scaling.minimum == {0: 1.0, 40000: 8192.0}
    assert (recipe.scale.power_of_two, recipe.scale.eps) == (True, 1e-10)
    assert (recipe.delayed.history, recipe.delayed.algorithm, recipe.delayed.margin, recipe.delayed.order) == (16, "max", 0, "after")
    assert (recipe.seed, recipe.strict) == (7, True)


def test_overrides_add() -> None:
    recipe = Recipe.load({"exempt": "a"})
    assert recipe.with_overrides() is recipe
    both = recipe.with_overrides(exempt="b", output_fused=[{"type": "Linear"}])
    assert both.to_dict()["exempt"] == ["a", "b"]
    assert both.to_dict()["output_fused"] == [{"type": "Linear"}]
    assert recipe.to_dict()["exempt"] == ["a"]
    with pytest.raises(RecipeError, match=r"^exempt\[0\] given beside the recipe: no module matches 'zz'"):
        Recipe.load("hybrid").with_overrides(exempt=["zz"]).check_names({"": ("Module",), "a": ("Linear",)})


def test_shipped_recipes_exempt_only_the_vocabulary_projection() -> None:
    assert Recipe.shipped() == ["blockwise", "delayed", "direct", "emulation-direct", "emulation-hybrid", "hybrid", "none", "rowwise"]
    for name in Recipe.shipped():
        data = Recipe.load(name).to_dict()
        exempting = [rule for rule in data["rules"] if "mode" in rule]
        assert exempting == [{"match": "*lm_head", "mode": "exempt", "optional": True, "reason": "vocabulary projection"}]
        assert not {"exempt", "boundary", "output_fused"} & set(data)


def test_the_exported_schema_is_current() -> None:
    """After a change of the grammar: `python -m fp8fx.recipe.reference schema > recipes/schema.json`."""
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == Recipe.schema()


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """As much of JSON schema as ours uses; it checks that the schema takes what the loader takes."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], value, root)
    if "anyOf" in schema:
        return any(accepts(one, value, root) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    if kind == "object":
        keys = schema.get("properties", {})
        extra = schema.get("additionalProperties", True)
        return isinstance(value, dict) and all(
            accepts(keys[key], entry, root) if key in keys else extra and accepts(extra, entry, root) for key, entry in value.items()
        )
    if kind == "array":
        return isinstance(value, list) and all(accepts(schema["items"], entry, root) for entry in value)
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[str(kind)])


@pytest.mark.parametrize("path", [*sorted((ROOT / "recipes").glob("*.yaml")), *EXAMPLES], ids=lambda path: path.stem)
def test_the_schema_accepts_what_loads(path: Path) -> None:
    schema = Recipe.schema()
    assert accepts(schema, yaml.safe_load(path.read_text()), schema)
    assert accepts(schema, Recipe.load(path).to_dict(), schema)
    assert not accepts(schema, {"defaults": {"mode": "hybird"}}, schema)
    assert not accepts(schema, {"default": {}}, schema)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_has_every_key(section: str) -> None:
    assert table(section) in PAGE, f"docs/recipes.md lacks the table of {section}: python -m fp8fx.recipe.reference"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_pages_recipes_load() -> None:
    assert len(blocks("yaml")) >= 5
    for text in blocks("yaml"):
        Recipe.load(yaml.safe_load(text))


def test_the_pages_errors_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of wrong YAML is followed by a block with its message."""
    monkeypatch.chdir(tmp_path)
    pairs = re.findall(r"```text title=mine.yaml\n(.*?)```\n+```console\n(.*?)\n```", PAGE, flags=re.DOTALL)
    assert len(pairs) > 3
    for text, expected in pairs:
        Path("mine.yaml").write_text(text)
        with pytest.raises(RecipeError) as error:
            Recipe.load("mine.yaml").check_names({"": ("ResNet", "Module"), "conv1": ("Conv2d",), "fc": ("Linear",)})
        assert str(error.value) == expected


def test_a_dump_finds_its_tables_and_moves_with_them(tmp_path: Path) -> None:
    """`tables/a.npy` and `~b.npy` beside it, `c.npy` in another folder of the project: all as paths from the dump."""
    project, out = tmp_path / "project", tmp_path / "project" / "out"
    for folder in (project / "tables", out):
        folder.mkdir(parents=True)
    for n, name in enumerate(("tables/a.npy", "out/~b.npy", "c.npy")):
        numpy.save(project / name, numpy.full((4, 4), 1.0 + n / 4, dtype=numpy.float32))
    rules = [{"match": name, "arithmetic": {"multiplier": str(project / path)}} for name, path in (("b", "out/~b.npy"), ("c", "c.npy"))]
    (project / "mine.yaml").write_text(yaml.safe_dump({"defaults": {"arithmetic": {"multiplier": "tables/a.npy"}}, "rules": rules}))
    recipe = Recipe.load(project / "mine.yaml")
    recipe.dump(out / "whole.yaml")
    text = (out / "whole.yaml").read_text()
    assert str(tmp_path) not in text
    written = yaml.safe_load(text)
    found = [layer["arithmetic"]["multiplier"] for layer in (written["defaults"], *written["rules"])]
    assert found == ["../tables/a.npy", "./~b.npy", "../c.npy"]
    assert Recipe.load(out / "whole.yaml") == recipe
    project.rename(tmp_path / "moved")
    moved = Recipe.load(tmp_path / "moved" / "out" / "whole.yaml")
    for made, value in zip(moved.resolve([Site(name=name, op="linear") for name in "xbc"]).decisions, (1.0, 1.25, 1.5), strict=True):
        assert made.spec is not None
        table = Arithmetic.parse(str(made.spec.arithmetic)).table(None)
        assert table is not None
        assert float(table.table[0, 0]) == value


def test_a_dump_keeps_the_path_of_a_table_that_is_nowhere_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.save(tmp_path / "a.npy", numpy.ones((4, 4), dtype=numpy.float32))
    (tmp_path / "out").mkdir()
    recipe = Recipe.load({"defaults": {"arithmetic": {"multiplier": str(tmp_path / "a.npy")}}})
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("os.path.commonpath", lambda paths: "/")
    recipe.dump("whole.yaml")
    assert yaml.safe_load(Path("whole.yaml").read_text())["defaults"]["arithmetic"]["multiplier"] == str(tmp_path / "a.npy")
    monkeypatch.undo()
    assert Recipe.load(tmp_path / "out" / "whole.yaml") == recipe


def test_arithmetic_round_trips(tmp_path: Path) -> None:
    """Keys side by side, a chunk's keys as one mapping, and a table beside the recipe, from wherever it is loaded."""
    numpy.save(tmp_path / "table.npy", numpy.ones((8, 8), dtype=numpy.float32))
    (tmp_path / "mine.yaml").write_text(
        "extends: hybrid\ndefaults: {arithmetic: {accumulate: {chunk: 64, inner: fp16}, shift: -2}}\n"
        "rules:\n  - {match: fc, optional: true, arithmetic: {multiplier: table.npy, gradients: same}}\n"
        "  - {match: out, optional: true, arithmetic: none}\n"
    )
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert Recipe.load(recipe.to_dict()) == recipe
    recipe.dump(tmp_path / "whole.yaml")
    assert Recipe.load(tmp_path / "whole.yaml") == recipe
    fc, out, rest = (made.spec for made in recipe.resolve([Site(name=name, op="linear") for name in ("fc", "out", "x")]).decisions)
    assert fc is not None
    assert out is not None
    assert rest is not None
    assert rest.accumulate == ("accumulate=float16/chunk=64/shift=-2", "precise", "precise")
    assert out.accumulate == ("fast", "precise", "precise")
    assert fc.accumulate[0] == fc.accumulate[2] != "fast"
    assert SiteSpec.parse_backward(fc.backward_text).accumulate == fc.accumulate
    table = Arithmetic.parse(str(fc.arithmetic)).table(None)
    assert table is not None
    assert table.mantissa_bits == 3
