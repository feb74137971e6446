"""What the grammar can say but nobody can mean, and what this version cannot do yet.

Each check yields (key path, problem). The loader turns them into a RecipeError, or into a warning under `strict: false`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8fx import formats
from fp8fx.errors import RecipeError
from fp8fx.recipe.grammar import Document, Layer, Match, Role, Rule
from fp8fx.recipe.merge import GRADIENT
from fp8fx.recipe.source import KeyPath
from fp8fx.spec import ROLES, SiteSpec

Problem = tuple[KeyPath, str]

_NOT_OVERRIDES = {"match", "optional", "reason"}


@dataclass(frozen=True)
class Conflict:
    """Keys of a role that contradict each other, the sentence about them, and what makes a valid role of it under `strict: false`."""

    keys: frozenset[str]
    text: str
    mended: dict[str, object]


def role_conflict(role: Role) -> Conflict | None:
    """The first contradiction between the keys of a complete role, or None."""
    return next(_conflicts(role), None)


def _conflicts(role: Role) -> Iterator[Conflict]:
    found = (*_scaling_conflicts(role), *_overflow_conflicts(role))
    yield from (Conflict(frozenset(keys.split()), text, mended) for keys, text, mended in found)


def _scaling_conflicts(role: Role) -> Iterator[tuple[str, str, dict[str, object]]]:
    scaling, block = role.scaling, role.granularity if isinstance(role.granularity, str) else list(role.granularity)
    if block != "tensor" and scaling != "current":
        why = {
            "delayed": "keeps one amax per tensor, so",
            "fixed": "has one max_value, so",
            "none": f"has no scale to give each {block}, so",
        }
        hint = "scaling: current" if scaling == "none" else "granularity: tensor"
        text = f"scaling: {scaling} {why[scaling]} granularity {block} is impossible; allowed: {hint}"
        yield "scaling granularity", text, {"granularity": "tensor"}
    if scaling == "fixed" and role.max_value is None:
        yield "scaling", "scaling: fixed needs a max_value, the magnitude that becomes the largest code", {"scaling": "current"}
    if scaling != "fixed" and role.max_value is not None:
        yield "scaling max_value", f"max_value has no effect with scaling: {scaling}; allowed: scaling: fixed", {"max_value": None}
    for key in ("statistic", "clip", "scale_format"):
        value, default = getattr(role, key), Role.model_fields[key].default
        fixed = key == "scale_format" and scaling == "fixed"
        if value != default and scaling != "current" and not fixed:
            also = " or fixed" if key == "scale_format" else ""
            text = f"{key}: {value} has no effect with scaling: {scaling}; allowed: scaling: current{also}"
            yield f"scaling {key}", text, {key: default}
    if role.percentile is not None and role.statistic != "percentile":
        text = f"percentile has no effect with statistic: {role.statistic}; allowed: statistic: percentile"
        yield "statistic percentile", text, {"percentile": None}


def _overflow_conflicts(role: Role) -> Iterator[tuple[str, str, dict[str, object]]]:
    if role.overflow == "saturate":
        return
    saturate: dict[str, object] = {"overflow": "saturate"}
    if formats.get(role.format).nan == "none":
        text = f"format {role.format} has neither inf nor NaN, so overflow: nonfinite is impossible; allowed: overflow: saturate"
        yield "format overflow", text, saturate
    below = {"statistic": role.statistic != "max", "clip": role.clip < 1.0, "scale_format": role.scale_format != "float32"}
    for key in (key for key, holds in below.items() if holds and role.scaling == "current"):
        text = (
            f"{key}: {getattr(role, key)} puts the largest code below max |x|, so overflow: nonfinite would make inf or NaN of ordinary "
            "values; allowed: overflow: saturate"
        )
        yield f"{key} overflow", text, saturate


def document_problems(document: Document) -> Iterator[Problem]:
    """Problems visible in one recipe alone."""
    yield from _layer_problems(document.defaults, ("defaults",))
    for index, rule in enumerate(document.rules):
        path: KeyPath = ("rules", index)
        yield from _layer_problems(rule, path)
        if not rule.model_fields_set - _NOT_OVERRIDES:
            yield path, "changes nothing: a rule needs a key beside match, such as mode: exempt"


def match_problems(document: Document) -> Iterator[Problem]:
    """A match that could select everything or nothing by accident: refused under `strict: false` too."""
    matches: list[tuple[KeyPath, Match]] = []
    for n, rule in enumerate(document.rules):
        if not rule.match:
            yield ("rules", n, "match"), "is empty: write a pattern such as '*.fc'"
        matches += [(("rules", n, "match", m), match) for m, match in enumerate(rule.match)]
    for key in ("exempt", "output_fused"):
        matches += [((key, n), match) for n, match in enumerate(getattr(document, key))]
    for path, match in matches:
        if not (match.name or match.type or match.op or match.min_numel is not None or match.max_numel is not None):
            yield path, "matches nothing: write name, type, op, min_numel or max_numel"
        elif _empty_range(match.min_numel, match.max_numel):
            yield path, "min_numel is above max_numel, so nothing matches"


def _empty_range(least: int | None, most: int | None) -> bool:
    return least is not None and most is not None and least > most


def _layer_problems(layer: Layer, path: KeyPath) -> Iterator[Problem]:
    for name in (*ROLES, "gemms", "accumulate"):
        keys = getattr(layer, name) if name in layer.model_fields_set else None
        if keys is not None and not keys.model_fields_set:
            yield (*path, name), "changes nothing: the mapping is empty"
        elif isinstance(keys, Role):
            texts = (conflict.text for conflict in _conflicts(keys) if conflict.keys <= keys.model_fields_set and len(conflict.keys) > 1)
            yield from (((*path, name), text) for text in texts)


def merged_problems(defaults: Layer, rules: tuple[Rule, ...], loss_scaling: str) -> Iterator[Problem]:
    """Problems of a recipe after `extends`. Paths say `defaults` or count merged rules."""
    for name in ROLES:
        role = getattr(defaults, name)
        if role is not None and (conflict := role_conflict(role)):
            yield ("defaults", name), conflict.text
    if loss_scaling != "dynamic":
        return
    layers: list[tuple[KeyPath, Layer]] = [(("defaults",), defaults), *((("rules", n), rule) for n, rule in enumerate(rules))]
    for path, layer in layers:
        for name in GRADIENT:
            role = getattr(layer, name)
            if role is not None and "overflow" in role.model_fields_set and role.overflow == "saturate":
                yield (*path, name, "overflow"), SATURATED_GRADIENT


SATURATED_GRADIENT = (
    "got 'saturate', impossible with loss_scaling.mode dynamic: a saturating gradient never becomes inf, so the scaler would "
    "never back off; allowed: nonfinite, or loss_scaling: {mode: static} or {mode: none}"
)


def refuse_unavailable(spec: SiteSpec, where: str) -> None:
    """What the grammar has and this version has not: delete a paragraph when its feature comes."""
    if spec.save_activation_inputs == "fp8":
        raise RecipeError(
            f"{where}: save_activation_inputs: got 'fp8'; keeping the inputs of activations in FP8 needs fused activations that this "
            "version of fp8fx does not have yet; allowed: model"
        )
