"""Every mistake a recipe file can hold: the whole message, with line, key path, what is allowed, and the nearest name.

`errors.txt` holds pairs of a file and its message. After a change of wording, look at the difference before you write it anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8fx.arithmetic import multiplier
from fp8fx.errors import FP8Warning, RecipeError
from fp8fx.recipe import Recipe, Site

BLOCKS = (Path(__file__).parent / "errors.txt").read_text(encoding="utf-8").split("=====\n")[1:]
CASES = [tuple(block.split("-----\n")) for block in BLOCKS]


def message(source: Any) -> str:
    with pytest.raises(RecipeError) as error:
        Recipe.load(source)
    return str(error.value)


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[repr(text)[:40] for text, _ in CASES])
def test_message(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplier, "_REGISTERED", {})  # messages list what other tests registered
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message(path).replace(f"{tmp_path}/", "") == expected.removesuffix("\n")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (None, "a recipe is a shipped name, a path, a dict or a Recipe; got None"),
        (b"hybrid", "got b'hybrid'"),
        ("hybird", "no shipped recipe is called 'hybird'; allowed: blockwise, delayed, direct, emulation-direct, emulation-hybrid"),
        ("hybird", "Did you mean 'hybrid'?"),
        ("", "no shipped recipe is called ''"),
        ("none.yml", "none.yml: there is no such file"),
        ("./hybrid", "hybrid: there is no such file"),
        ("/", "cannot be read"),
        ("a\0.yaml", "cannot be read"),
        ({"defaults": {"mode": "hybird"}}, "<dict>: defaults.mode: got 'hybird'"),
        ({"rules": [{"match": "fc", "input": {"format": "e4m3"}}]}, "<dict>: rules[0].input.format: format 'e4m3' is ambiguous"),
        ({"defaults": {"input": {"format": torch.int8}}}, "<dict>: defaults.input.format: unknown format torch.int8"),
        ({"defaults": {"input": {"format": 7}}}, "<dict>: defaults.input.format: got 7; allowed: a format such as e4m3fn"),
        ({1: 2}, "<dict>: 1: got 2; allowed: keys that are words"),
        ({"defaults": {None: 1}}, "<dict>: defaults: a key is a word or a number, got None"),
        ({True: 1}, "YAML reads on, off, yes and no as booleans"),
        ({"version": float("nan")}, "<dict>: version: got nan; allowed: a number"),
    ],
)
def test_other_sources(source: Any, part: str) -> None:
    assert part in message(source)


def test_dict_that_holds_itself() -> None:
    loop: dict[str, Any] = {}
    loop["defaults"] = loop
    assert message(loop) == "<dict>: defaults.defaults.defaults...: nested more than 40 levels deep, or holds itself"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml: cannot be read" in message(path)


def test_yaml_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: " + "[" * 5000)
    assert message(path).endswith("nested too deep")


def test_yaml_alias_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)))
    assert "an alias that repeats itself" in message(path)


def test_circle_shows_the_chain(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}.yaml\n")
    text = message(tmp_path / "a.yaml").replace(f"{tmp_path}{os.sep}", "")
    assert text == "c.yaml:1: extends: got 'b.yaml', which is a circle: a.yaml -> b.yaml -> c.yaml -> b.yaml"


def test_error_in_the_extended_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\ndefaults:\n  mode: exmpt\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\n")
    assert message(tmp_path / "top.yaml").startswith(f"{tmp_path}/base.yaml:3: defaults.mode: got 'exmpt'")


def test_conflict_that_only_merging_makes(tmp_path: Path) -> None:
    """The file that writes the key is named, though each file alone is fine."""
    (tmp_path / "base.yaml").write_text("defaults:\n  grad_output: {overflow: saturate}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nloss_scaling: {mode: dynamic}\n")
    assert message(tmp_path / "top.yaml").startswith(f"{tmp_path}/base.yaml:2: defaults.grad_output.overflow: got 'saturate', impossible")


def test_not_strict_warns_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "loose.yaml"
    path.write_text("strict: off\ndefualts: {mode: direct}\nrules: [{match: fc, mdoe: exempt}]\n")
    with pytest.warns(FP8Warning) as caught:
        recipe = Recipe.load(path)
    texts = sorted(str(one.message).replace(f"{tmp_path}/", "").split("; allowed")[0] for one in caught)
    assert texts[:2] == ["loose.yaml:2: defualts: unknown key", "loose.yaml:3: rules[0].mdoe: unknown key"]
    assert texts[2].startswith("loose.yaml:3: rules[0]: changes nothing")
    assert not recipe.strict


def test_not_strict_still_refuses_wrong_values() -> None:
    assert "got 'hybird'" in message({"strict": False, "defaults": {"mode": "hybird"}})


def test_not_strict_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("strict: false\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nrules: [{match: fc}]\n")
    with pytest.warns(FP8Warning, match="changes nothing"):
        assert not Recipe.load(tmp_path / "top.yaml").strict


def test_the_extending_recipes_strict_counts(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("strict: false\nrules: [{match: fc}]\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nstrict: true\n")
    assert "base.yaml:2: rules[0]: changes nothing" in message(tmp_path / "top.yaml")


def test_not_strict_still_refuses_an_empty_match() -> None:
    assert "exempt[0]: matches nothing" in message({"strict": False, "exempt": [{}]})


def test_overrides_say_where_they_come_from() -> None:
    with pytest.raises(RecipeError, match=r"^given beside the recipe: exempt\[1\]: got 7; allowed: a pattern"):
        Recipe.load("hybrid").with_overrides(exempt=["fc", 7])  # type: ignore[list-item]


def test_conflict_that_only_rules_make() -> None:
    rules = [{"match": "fc", "input": {"scaling": "delayed"}}, {"match": "f*", "input": {"granularity": "row"}}]
    site = Site(name="fc", op="linear", numel=4, has_weight=True)
    with pytest.raises(RecipeError, match=r"^<dict>: rules\[1\].input: after merging, scaling: delayed keeps one amax per tensor"):
        Recipe.load({"rules": rules}).resolve([site])


def test_blocks_that_meet_an_unscaled_role_are_noted() -> None:
    rules = [{"match": "fc", "mode": "direct"}, {"match": "f*", "input": {"granularity": "row"}}]
    found = Recipe.load({"rules": rules}).resolve([Site(name="fc", op="linear", numel=4, has_weight=True)])
    assert found.notes == ["rules[1] 'f*': granularity of input has no effect where scaling is none"]
    assert found.decisions[0].spec is not None
    assert found.decisions[0].spec.input == found.decisions[0].spec.weight
