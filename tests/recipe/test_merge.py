"""Presets, and which key wins: modes reset roles, keys merge onto roles, extending recipes onto extended ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fp8fx.recipe import Decision, Recipe, Site
from fp8fx.spec import ROLES, SiteSpec

FC = Site(name="fc", op="linear", types=("Linear", "Module"), numel=64, has_weight=True)

E4M3 = "e4m3fn/current/tensor/nearest_even/saturate"
E5M2 = "e5m2/current/tensor/nearest_even/nonfinite"
PLAIN = "e5m2/none/tensor/nearest_even/saturate"
PLAIN_GRADIENT = "e5m2/none/tensor/stochastic/nonfinite"


def decide(source: Any) -> Decision:
    return Recipe.load(source).resolve([FC]).decisions[0]


def spec(source: Any) -> SiteSpec:
    found = decide(source).spec
    assert found is not None
    return found


def texts(source: Any) -> dict[str, str]:
    """The quantized roles of one layer under a recipe."""
    found = spec(source)
    return {role: getattr(found, role).text for role in ROLES if getattr(found, role) is not None}


HYBRID = {"input": E4M3, "weight": E4M3, "grad_output": E5M2}
DIRECT = {**dict.fromkeys(ROLES[:3], PLAIN), **dict.fromkeys(ROLES[3:], PLAIN_GRADIENT)}
ROWWISE = {
    **dict.fromkeys(ROLES[:2], "e4m3fn/current/row/nearest_even/saturate/power_of_two"),
    "grad_output": "e4m3fn/current/row/nearest_even/nonfinite/power_of_two",
}
BLOCKWISE = {
    "input": "e4m3fn/current/1x128/nearest_even/saturate/power_of_two",
    "weight": "e4m3fn/current/128x128/nearest_even/saturate/power_of_two",
    "grad_output": "e4m3fn/current/1x128/nearest_even/nonfinite/power_of_two",
}
TOOLKIT_HYBRID = {"input": E4M3, "weight": E4M3, **dict.fromkeys(ROLES[3:], PLAIN_GRADIENT)}


@pytest.mark.parametrize(
    ("name", "roles", "loss_scaling", "when"),
    [
        ("hybrid", HYBRID, "none", "auto"),
        ("rowwise", ROWWISE, "none", "auto"),
        ("blockwise", BLOCKWISE, "none", "auto"),
        ("direct", DIRECT, "dynamic", "auto"),
        ("emulation-direct", DIRECT, "dynamic", "emulate"),
        ("emulation-hybrid", TOOLKIT_HYBRID, "dynamic", "emulate"),
    ],
)
def test_shipped(name: str, roles: dict[str, str], loss_scaling: str, when: str) -> None:
    recipe = Recipe.load(name)
    assert texts(recipe) == roles
    assert recipe.loss_scaling.mode == loss_scaling
    assert (recipe.loss_scaling.init, recipe.loss_scaling.growth_interval) == (65536.0, 2000)
    assert decide(recipe).when_not_faster == when
    head = Recipe.load(name).resolve([Site(name="model.lm_head", op="linear", has_weight=True)]).decisions[0]
    assert head.mode == "exempt"
    assert head.reason.endswith(" '*lm_head': vocabulary projection")


def test_none_exempts_everything() -> None:
    assert decide("none") == Decision(mode="exempt", spec=None, reason="defaults (exempt)")


def test_empty_dict_is_hybrid() -> None:
    assert texts({}) == HYBRID
    assert decide({}).reason == "defaults (hybrid)"


def test_every_spec_field_comes_from_the_recipe() -> None:
    keys = {
        "gemms": {"grad_weight": "high_precision"},
        "accumulate": {"output": "precise"},
        "save_for_backward": "high_precision",
        "weight_transpose": "keep",
        "weight_cache": "step",
        "attention": "emulate",
        "when_not_faster": "high_precision",
    }
    found = spec({"defaults": keys})
    assert found.gemms == ("output", "grad_input")
    assert found.accumulate == ("precise", "precise", "precise")
    assert (found.save_for_backward, found.weight_transpose, found.weight_cache) == ("high_precision", "keep", "step")
    assert (decide({"defaults": keys}).attention, decide({"defaults": keys}).when_not_faster) == ("emulate", "high_precision")


def test_mode_resets_roles_and_keys_beside_it_apply_after() -> None:
    defaults = {"input": {"format": "e3m4fn"}, "rounding": "up"}
    assert texts({"defaults": defaults, "rules": [{"match": "fc", "mode": "hybrid"}]}) == HYBRID
    rule = {"match": "fc", "mode": "direct", "output": "none"}
    assert texts({"defaults": defaults, "rules": [rule]}) == {role: DIRECT[role] for role in ROLES if role != "output"}


def test_mode_keeps_what_is_not_a_role() -> None:
    defaults = {"weight_cache": "step", "gemms": {"output": "high_precision"}}
    found = spec({"defaults": defaults, "rules": [{"match": "fc", "mode": "direct"}]})
    assert (found.weight_cache, found.gemms) == ("step", ("grad_input", "grad_weight"))


def test_part_of_a_role_merges_onto_the_role() -> None:
    rules = [{"match": "fc", "input": {"granularity": [1, 128]}}, {"match": "fc", "input": {"rounding": "up"}}]
    assert texts({"rules": rules})["input"] == "e4m3fn/current/1x128/up/saturate"


def test_part_of_a_role_that_is_none_starts_from_the_preset() -> None:
    rules = [{"match": "fc", "weight": "none"}, {"match": "fc", "weight": {"granularity": "channel"}}]
    assert texts({"rules": rules})["weight"] == "e4m3fn/current/row/nearest_even/saturate"
    assert texts({"defaults": {"output": {"format": "e5m2"}}})["output"] == "e5m2/current/tensor/nearest_even/saturate"
    assert texts({"defaults": {"grad_weight": {"rounding": "up"}}})["grad_weight"] == "e5m2/current/tensor/up/nonfinite"


def test_none_and_null_and_off_are_the_same() -> None:
    for nothing in ("none", None, False):
        assert "weight" not in texts({"defaults": {"weight": nothing}})


def test_rounding_goes_to_every_role_and_overflow_to_forward_roles() -> None:
    found = texts({"defaults": {"rounding": "stochastic", "overflow": "nonfinite", "weight": {"rounding": "up"}}})
    assert found == {
        "input": "e4m3fn/current/tensor/stochastic/nonfinite",
        "weight": "e4m3fn/current/tensor/up/nonfinite",
        "grad_output": "e5m2/current/tensor/stochastic/nonfinite",
    }
    later = texts({"defaults": {"rounding": "up", "overflow": "saturate"}, "rules": [{"match": "fc", "grad_input": {"format": "e5m2"}}]})
    assert later["grad_input"] == "e5m2/current/tensor/up/nonfinite"


def test_boundary_comes_before_rules() -> None:
    recipe = {"boundary": {"first": "exempt", "last": "direct"}}
    names = ["stem", "mid", "fc"]
    sites = [Site(name="emb", op="embedding", numel=9, has_weight=True)]
    sites += [Site(name=name, op="linear", numel=9, has_weight=True) for name in names]
    sites += [Site(name="attn.matmul", op="matmul")]
    found = Recipe.load(recipe).resolve(sites).decisions
    assert [one.mode for one in found] == ["fp8", "exempt", "fp8", "fp8", "fp8"]
    assert [one.reason for one in found][1:4] == ["boundary.first", "defaults (hybrid)", "boundary.last"]
    back = Recipe.load({**recipe, "rules": [{"match": "stem", "mode": "hybrid"}]}).resolve(sites).decisions[1]
    assert (back.mode, back.reason) == ("fp8", "rules[0] 'stem'")


def test_exempt_comes_after_rules() -> None:
    recipe = {"rules": [{"match": "fc", "mode": "direct"}], "exempt": "fc"}
    assert decide(recipe) == Decision(mode="exempt", spec=None, reason="exempt 'fc'")


def test_output_fused_leaves_the_output_in_high_precision() -> None:
    found = decide({"defaults": {"mode": "direct"}, "output_fused": ["f*"]})
    assert found.output_fused
    assert found.reason == "defaults (direct)"
    assert found.spec is not None
    assert found.spec.output is None
    assert found.spec.grad_output is not None
    assert found.spec.grad_input is not None


def test_exempt_reason_names_the_rule_that_exempted() -> None:
    rules = [{"match": "fc", "mode": "exempt", "reason": "small"}, {"match": "*", "input": {"rounding": "up"}}]
    assert decide({"rules": rules}).reason == "rules[0] 'fc': small"


def test_a_reason_says_where_the_rule_stands_that_decided(tmp_path: Path) -> None:
    """By file, line and number in that file, whatever the number among all that are merged; a dict has numbers alone."""
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("extends: hybrid\nrules:\n  - {match: a, mode: direct}\n  - match: b\n    mode: direct\nexempt:\n  - x\n  - y\n")
    rules = "rules:\n  - {match: c, mode: exempt, reason: small}\n  - {match: 'd?', input: none}\n"
    top.write_text(f"# mine\nextends: base.yaml\n{rules}exempt: z\n")
    sites = [Site(name=name, op="linear", numel=9, has_weight=True) for name in ("a", "b", "c", "d1", "x", "y", "z", "e", "f")]
    given = {"extends": str(top), "rules": [{"match": "e", "mode": "direct"}], "exempt": "a"}
    found = Recipe.load(given).with_overrides(exempt="f").resolve(sites)
    assert [one.reason for one in found.decisions] == [
        "exempt 'a'",
        f"{base}:4: rules[1] 'b'",
        f"{top}:4: rules[0] 'c': small",
        f"{top}:5: rules[1] 'd?'",
        f"{base}:7: exempt 'x'",
        f"{base}:8: exempt 'y'",
        f"{top}:6: exempt 'z'",
        "rules[0] 'e'",
        "exempt 'f'",
    ]
    alone = [Site(name="other", op="linear", numel=9, has_weight=True)]
    notes = Recipe.load(top).resolve(alone, {site.name: ("Linear",) for site in (*sites, *alone)}).notes
    assert f"{top}:5: rules[1] 'd?': matches modules but no quantizable site" in notes


def test_all_roles_none_is_exempt() -> None:
    found = decide({"rules": [{"match": "fc", "input": None, "weight": None, "grad_output": None}]})
    assert (found.mode, found.reason) == ("exempt", "rules[0] 'fc'; every role is none")


def test_scale_is_for_scaled_roles_only() -> None:
    found = texts({"defaults": {"grad_output": {"scaling": "none"}}, "scale": {"power_of_two": True, "eps": "1e-8"}})
    assert found["input"].endswith("/power_of_two/eps=1e-08")
    assert found["grad_output"] == "e5m2/none/tensor/nearest_even/nonfinite"


def test_torch_dtypes_are_formats() -> None:
    assert texts({"defaults": {"weight": {"format": torch.float8_e5m2}}})["weight"].startswith("e5m2/")


def test_extends_merges_deeply(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "defaults: {input: {granularity: row}, weight_cache: step}\n"
        "rules: [{match: fc, mode: direct}]\nexempt: [fc]\nloss_scaling: {mode: dynamic, init: 16, minimum: {0: 1, 9: 2}}\nseed: 3\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: base.yaml\ndefaults: {input: {rounding: up}}\nrules: [{match: fc, mode: hybrid}]\nloss_scaling: {minimum: {5: 4}}\n"
    )
    recipe = Recipe.load(tmp_path / "top.yaml")
    # the base's exempt list comes before the rules of the recipe that extends it
    assert texts(recipe) == HYBRID
    other = recipe.resolve([Site(name="other", op="linear", numel=1, has_weight=True), FC]).decisions[0].spec
    assert other is not None
    assert other.input is not None
    assert other.input.text == "e4m3fn/current/row/up/saturate"
    assert (recipe.loss_scaling.init, recipe.loss_scaling.minimum) == (16.0, {5: 4.0})
    assert recipe.seed == 3


def test_extending_with_a_mode_resets_inherited_roles(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("defaults: {input: {granularity: row}}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ndefaults: {mode: direct}\n")
    recipe = Recipe.load(tmp_path / "top.yaml")
    assert texts(recipe) == DIRECT
    assert recipe.loss_scaling.mode == "dynamic"  # follows defaults.mode: nobody wrote another


def test_extends_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "base.yaml").write_text("extends: direct\n")
    (tmp_path / "inner" / "top.yaml").write_text("extends: ./base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert texts("inner/top.yaml") == DIRECT
    assert texts({"extends": tmp_path / "inner" / "base.yaml"}) == DIRECT


GRAMMAR = r"""
version: 1
extends: hybrid
defaults:
  mode: hybrid
  input:       {format: e4m3fn, scaling: current, granularity: tensor}
  weight:      {format: e4m3fn, scaling: current, granularity: tensor}
  output:      none
  grad_output: {format: e5m2, scaling: current, rounding: nearest_even}
  grad_input:  none
  grad_weight: none
  gemms: {output: fp8, grad_input: fp8, grad_weight: fp8}
  accumulate: {output: fast, grad_input: precise, grad_weight: precise}
  rounding: nearest_even
  overflow: saturate
  when_not_faster: auto
  attention: high_precision
  weight_cache: none
  save_for_backward: fp8
  weight_transpose: recompute
  save_activation_inputs: model
boundary: {first: exempt, last: exempt}
rules:
  - {match: "*lm_head", mode: exempt, optional: true, reason: vocabulary projection}
  - {match: {type: Embedding}, mode: exempt}
  - {match: 're:layers\.(0|1)\..*', mode: direct}
  - match: {name: "*.down_proj", min_numel: 65536}
    input:  {granularity: [1, 128]}
    weight: {granularity: [128, 128]}
exempt: ["conv1", "bn1", "fc"]
output_fused: ["layer1.*.conv1"]
delayed: {history: 16, algorithm: max, margin: 0, order: after}
scale: {power_of_two: false, eps: 1.0e-12}
loss_scaling: {mode: dynamic, init: 65536, growth_interval: 2000, minimum: {0: 1, 40000: 8192}}
"""


def test_every_key_at_once(tmp_path: Path) -> None:
    """All of the grammar in one file, on a model with a bit of everything."""
    file = tmp_path / "all.yaml"
    file.write_text(GRAMMAR)
    rules, exempt = [f"{file}:{line}: rules[{n}]" for n, line in enumerate((24, 25, 26, 27))], f"{file}:30: exempt"
    rows = [
        ("emb", "embedding", "Embedding", "exempt", f"{rules[1]} {{type: Embedding}}"),
        ("conv1", "conv2d", "Conv2d", "exempt", f"{exempt} 'conv1'"),
        ("layer1.0.conv1", "conv2d", "Conv2d", "fp8", "defaults (hybrid)"),
        ("layers.0.mlp.up_proj", "linear", "Linear", "fp8", rf"{rules[2]} 're:layers\\.(0|1)\\..*'"),
        ("layers.0.mlp.down_proj", "linear", "Linear", "fp8", f"{rules[3]} {{name: *.down_proj, min_numel: 65536}}"),
        ("layers.2.mlp.down_proj", "linear", "Linear", "fp8", f"{rules[3]} {{name: *.down_proj, min_numel: 65536}}"),
        ("fc", "linear", "Linear", "exempt", f"{exempt} 'fc'"),
        ("head", "linear", "Linear", "exempt", "boundary.last"),
    ]
    sites = [Site(name=name, op=op, types=(type_, "Module"), numel=1 << 20, has_weight=True) for name, op, type_, _, _ in rows]
    modules = {site.name: site.types for site in sites} | {"bn1": ("BatchNorm2d", "Module")}
    recipe = Recipe.load(file)
    recipe.check_names(modules)
    found = recipe.resolve(sites, modules)
    assert [(one.mode, one.reason) for one in found.decisions] == [(mode, reason) for *_, mode, reason in rows]
    assert found.decisions[2].output_fused
    direct, blocks = found.decisions[4].spec, found.decisions[5].spec
    assert direct is not None
    assert blocks is not None
    assert direct.input is not None
    assert direct.input.text == PLAIN
    assert (blocks.input, blocks.weight) != (None, None)
    assert [role.text for role in (blocks.input, blocks.weight) if role] == [
        "e4m3fn/current/1x128/nearest_even/saturate",
        "e4m3fn/current/128x128/nearest_even/saturate",
    ]
    assert found.notes == [
        f"{rules[3]} {{name: *.down_proj, min_numel: 65536}}: granularity of input has no effect where scaling is none",
        f"{rules[3]} {{name: *.down_proj, min_numel: 65536}}: granularity of weight has no effect where scaling is none",
        f"{exempt} 'bn1': matches modules but no quantizable site",
    ]
