"""What the grammar can say but nobody can mean, and what this version cannot do yet.

Each check yields (key path, problem). The loader turns them into a RecipeError, or into a warning under `strict: false`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fp8fx.recipe.grammar import Document, Layer, Match, Role, Rule
from fp8fx.recipe.merge import GRADIENT
from fp8fx.recipe.source import KeyPath
from fp8fx.spec import ROLES

Problem = tuple[KeyPath, str]

_NOT_OVERRIDES = {"match", "optional", "reason"}


def role_conflict(role: Role) -> str | None:
    """Why the keys of a role contradict each other, or None."""
    if role.granularity == "tensor" or role.scaling == "current":
        return None
    block = role.granularity if isinstance(role.granularity, str) else list(role.granularity)
    if role.scaling == "delayed":
        return f"scaling: delayed keeps one amax per tensor, so granularity {block} is impossible; allowed: granularity: tensor"
    return f"scaling: none has no scale to give each {block}, so granularity {block} is impossible; allowed: scaling: current"


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
        elif isinstance(keys, Role) and {"scaling", "granularity"} <= keys.model_fields_set and (text := role_conflict(keys)):
            yield (*path, name), text


def merged_problems(defaults: Layer, rules: tuple[Rule, ...], loss_scaling: str) -> Iterator[Problem]:
    """Problems of a recipe after `extends`. Paths say `defaults` or count merged rules."""
    for name in ROLES:
        role = getattr(defaults, name)
        if role is not None and (text := role_conflict(role)):
            yield ("defaults", name), text
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
