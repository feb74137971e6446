"""Patterns against names, types, ops and sizes; and what happens to those that match nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fp8fx.errors import FP8Warning, RecipeError
from fp8fx.recipe import Recipe, Resolution, Site
from fp8fx.recipe.match import may_be_functional

LINEAR = ("Linear", "Module", "object")
CONV = ("Conv2d", "_ConvNd", "Module", "object")
BLOCK = ("BasicBlock", "Module", "object")

RESNET: dict[str, tuple[str, ...]] = {
    "": ("ResNet", "Module", "object"),
    "conv1": CONV,
    "bn1": ("BatchNorm2d", "_BatchNorm", "_NormBase", "Module", "object"),
    "layer1": ("Sequential", "Module", "object"),
    "layer1.0": BLOCK,
    "layer1.0.conv1": CONV,
    "layer1.1": BLOCK,
    "layer1.1.conv1": CONV,
    "layer10": ("Sequential", "Module", "object"),
    "layer10.conv": CONV,
    "fc": LINEAR,
}
SITES = [
    Site(name="conv1", op="conv2d", types=CONV, numel=9408, has_weight=True),
    Site(name="layer1.0.conv1", op="conv2d", types=CONV, numel=36864, has_weight=True),
    Site(name="layer1.1.conv1", op="conv2d", types=CONV, numel=36864, has_weight=True),
    Site(name="layer1.1.matmul_1", op="matmul", types=BLOCK),
    Site(name="layer10.conv", op="conv2d", types=CONV, numel=36864, has_weight=True),
    Site(name="fc", op="linear", types=LINEAR, numel=512000, has_weight=True),
]


def exempted(*patterns: Any) -> list[str]:
    """Names of the sites that a recipe with one exempt rule leaves in high precision, checked as compile() does."""
    recipe = Recipe.load({"rules": [{"match": list(patterns), "mode": "exempt"}]})
    recipe.check_names(RESNET)
    decisions = recipe.resolve(SITES, RESNET).decisions
    return [site.name for site, decision in zip(SITES, decisions, strict=True) if decision.mode == "exempt"]


ALL = [site.name for site in SITES]
IN_LAYER1 = ["layer1.0.conv1", "layer1.1.conv1", "layer1.1.matmul_1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["conv1"], ["conv1"]),  # a bare name is the whole name, not an ending
        (["*conv1"], ["conv1", "layer1.0.conv1", "layer1.1.conv1"]),
        (["*.conv1"], ["layer1.0.conv1", "layer1.1.conv1"]),
        (["layer1"], IN_LAYER1),  # a container selects its subtree, and layer10 is not in it
        (["layer1*"], [*IN_LAYER1, "layer10.conv"]),
        (["layer1.?"], IN_LAYER1),
        (["layer1.[1-9].*"], ["layer1.1.conv1", "layer1.1.matmul_1"]),
        (["*.1"], ["layer1.1.conv1", "layer1.1.matmul_1"]),
        (["*"], ALL),
        ([r"re:layer1\.[01]\.conv1"], ["layer1.0.conv1", "layer1.1.conv1"]),
        ([r"re:layer\d+\.\w+"], ["layer10.conv"]),  # a full match, without subtrees
        (["layer1.1.matmul_1"], ["layer1.1.matmul_1"]),
        ([r"re:.*\.matmul(_\d+)?"], ["layer1.1.matmul_1"]),
        ([{"type": "Conv2d"}], ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer10.conv"]),
        ([{"type": "_ConvNd"}], ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer10.conv"]),
        ([{"type": "BasicBlock"}], IN_LAYER1),  # like a name, the type of a container selects its subtree
        ([{"type": ["Linear", "BasicBlock"]}], [*IN_LAYER1, "fc"]),
        ([{"op": "matmul"}], ["layer1.1.matmul_1"]),
        ([{"op": ["matmul", "linear"]}], ["layer1.1.matmul_1", "fc"]),
        ([{"min_numel": 36864, "max_numel": 36864}], ["layer1.0.conv1", "layer1.1.conv1", "layer10.conv"]),
        ([{"max_numel": 9408}], ["conv1"]),  # a site without a weight has no size
        ([{"name": "layer1.*", "op": "conv2d"}], ["layer1.0.conv1", "layer1.1.conv1"]),
        (["fc", {"op": "matmul"}], ["layer1.1.matmul_1", "fc"]),
    ],
)
def test_selects(patterns: list[Any], expected: list[str]) -> None:
    assert exempted(*patterns) == expected


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("conv11", "no module matches 'conv11'. Did you mean 'conv1'?"),
        ("layer1.0.convl", "no module matches 'layer1.0.convl'. Did you mean 'layer1.0.conv1'?"),
        ("*.cnv", "no module matches '*.cnv'. Did you mean 'conv1'?"),
        (r"re:layer1\.0\.cnv1", r"no module matches 're:layer1\\.0\\.cnv1'. Did you mean 'layer1.0.conv1'?"),
        ({"type": "Linaer"}, "no module has the type 'Linaer'. Did you mean 'Linear'?"),
        ({"name": "fc", "type": "Conv2d"}, "no module matches both name and type of {name: fc, type: Conv2d}"),
        (["fc", "conv11"], "no module matches 'conv11'. Did you mean 'conv1'?"),
    ],
)
def test_check_names_refuses_what_matches_nothing(pattern: Any, problem: str) -> None:
    rule = {"match": pattern, "mode": "exempt"}
    with pytest.raises(RecipeError) as error:
        Recipe.load({"rules": [rule]}).check_names(RESNET)
    assert str(error.value) == f"<dict>: rules[0]: {problem}"
    Recipe.load({"rules": [{**rule, "optional": True}]}).check_names(RESNET)
    with pytest.warns(FP8Warning, match="no module"):
        Recipe.load({"rules": [rule], "strict": False}).check_names(RESNET)


@pytest.mark.parametrize("pattern", ["layer1.0.matmul", "*.matmul_7", "*attention", {"op": "conv3d"}, {"min_numel": 10**9}])
def test_what_only_capture_knows_is_refused_by_resolve(pattern: Any) -> None:
    recipe = Recipe.load({"rules": [{"match": pattern, "mode": "exempt"}]})
    recipe.check_names(RESNET)
    for modules in (RESNET, None):
        with pytest.raises(RecipeError, match=r"^<dict>: rules\[0\]: .* matches nothing in the model$"):
            recipe.resolve(SITES, modules)
        assert recipe.resolve(SITES, modules, partial=True).notes[0].endswith("matches nothing")
    loose = Recipe.load({"rules": [{"match": pattern, "mode": "exempt"}], "strict": False})
    with pytest.warns(FP8Warning, match="matches nothing"):
        assert loose.resolve(SITES).notes[0].endswith("matches nothing")


@pytest.mark.parametrize("word", ["matmul", "bmm_3", "attention", "linear", "conv2d_1", "embedding", "scaled_dot_product_attention"])
def test_looks_like_a_functional_site(word: str) -> None:
    for pattern in (word, f"a.b.{word}", f"*.{word}", f"*{word}", rf"re:.*\.{word}", f"*.{word}*", rf"re:.*\.{word}(_\d+)?"):
        assert may_be_functional(pattern), pattern


@pytest.mark.parametrize("pattern", ["fc", "a.matmul.fc", "*.attn", "matmuls", "linear_proj", "my_linear", "re:.*fc", "attn.self", "*"])
def test_does_not_look_like_a_functional_site(pattern: str) -> None:
    assert not may_be_functional(pattern)


def seeds_recipe() -> Recipe:
    return Recipe.load("direct").with_overrides(exempt=["conv1", "bn1", "fc"])


@pytest.mark.parametrize("modules", [RESNET, None])
def test_the_emulation_toolkits_list_works_as_it_stands(modules: Any) -> None:
    recipe = seeds_recipe()
    recipe.check_names(RESNET)
    found = recipe.resolve(SITES, modules)
    assert [one.mode for one in found.decisions] == ["exempt", "fp8", "fp8", "fp8", "fp8", "exempt"]
    assert found.notes == ["exempt 'bn1': matches modules but no quantizable site"]


def test_regex_that_hits_only_containers_gets_a_hint() -> None:
    recipe = Recipe.load({"exempt": [r"re:layer1\.0"]})
    recipe.check_names(RESNET)
    assert recipe.resolve(SITES, RESNET).notes == [
        r"exempt 're:layer1\\.0': matches modules but no quantizable site (a regular expression selects no subtree)"
    ]


def test_sites_that_match_alike_share_a_decision() -> None:
    found = Recipe.load("hybrid").resolve(SITES).decisions
    assert len({id(one) for one in found}) == 1


def test_many_sites_are_fast() -> None:
    """1,600 sites and 5 rules; the target is 50 ms, the bound leaves room for a busy machine."""
    sites = [Site(name=f"model.layers.{n // 8}.mlp.proj_{n % 8}", op="linear", types=LINEAR, numel=n, has_weight=True) for n in range(1600)]
    modules = {site.name: LINEAR for site in sites}
    rules: list[dict[str, Any]] = [
        {"match": "*lm_head", "mode": "exempt", "optional": True},
        {"match": {"type": "Linear", "min_numel": 100}, "input": {"granularity": [1, 128]}},
        {"match": r"re:model\.layers\.(0|1)\..*", "mode": "direct"},
        {"match": ["*.proj_1", "*.proj_2"], "rounding": "up"},
        {"match": "model.layers.3", "mode": "exempt"},
    ]
    recipe = Recipe.load({"rules": rules})

    def timed() -> float:
        start = time.process_time()
        found: Resolution = recipe.resolve(sites, modules)
        assert len(found.decisions) == 1600
        return time.process_time() - start

    assert min(timed() for _ in range(5)) < 0.1
