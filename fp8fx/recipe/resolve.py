"""From a recipe and the sites of a model to one decision per site.

Order, later over earlier: defaults, boundary, rules, exempt, output_fused. Sites that match the same rules share one decision, so
thousands of sites cost a handful of merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fp8fx.recipe import match as matching
from fp8fx.recipe.checks import role_conflict
from fp8fx.recipe.grammar import Document, Layer, Match, Role, Rule
from fp8fx.recipe.load import Merged, complain, sugar_rule
from fp8fx.recipe.match import Modules, Site
from fp8fx.recipe.merge import merge
from fp8fx.recipe.sections import Scale
from fp8fx.spec import GEMMS, ROLES, SiteSpec, TensorSpec

# Sites that `first` and `last` may mean. An embedding is a lookup, and bmm or attention have no weight of their own.
BOUNDARY_OPS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one site does, and why. `spec` is None if and only if `mode` is "exempt"."""

    mode: str
    spec: SiteSpec | None
    output_fused: bool = False
    reason: str = ""
    attention: str = "high_precision"
    when_not_faster: str = "auto"


class Unmatched(str):
    """A note that a pattern matched none of the sites given: of a model captured as several graphs it holds if all of them say so."""


@dataclass(frozen=True)
class Resolution:
    """One decision per site, in the order of the sites, and notes for the plan."""

    decisions: list[Decision]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One entry that may change a layer: a rule, or an entry of boundary, exempt or output_fused.

    entry: in reasons, before the pattern. place: in errors. detail: the rule's own `reason`.
    """

    rule: Rule
    entry: str
    place: str
    detail: str = ""

    @property
    def label(self) -> str:
        patterns = ", ".join(matching.describe(match) for match in self.rule.match)
        return f"{self.entry} {patterns}" if patterns else self.entry

    @property
    def why(self) -> str:
        return f"{self.label}: {self.detail}" if self.detail else self.label


def steps(merged: Merged) -> list[Step]:
    """Rules, exempt and output_fused as one ordered list."""
    found = []
    for key in ("rules", "exempt", "output_fused"):
        for n, one in enumerate(getattr(merged.document, key)):
            rule, place = one if isinstance(one, Rule) else sugar_rule(key, one), merged.places[(key, n)]
            found.append(Step(rule, place.entry, place.text, rule.reason))
    return found


def check_names(merged: Merged, modules: Modules) -> None:
    """Every name and type pattern must match a module of the model, or be one that only capture can decide."""
    strict = merged.document.strict
    for step in steps(merged):
        if step.rule.optional:
            continue
        for match in step.rule.match:
            for problem in _unmatched(match, modules):
                complain(step.place, problem, strict)


def _unmatched(match: Match, modules: Modules) -> Iterator[str]:
    deferred = False
    missing = False
    for pattern in match.name:
        if any(matching.name_matches(pattern, name) for name in modules):
            continue
        if matching.may_be_functional(pattern):
            deferred = True
        else:
            missing = True
            yield matching.missing_name(pattern, modules)
    for pattern in match.type:
        if not any(matching.type_matches(pattern, types) for types in modules.values()):
            missing = True
            yield matching.missing_type(pattern, modules)
    if match.name and match.type and not missing and not deferred and not _together(match, modules):
        yield f"no module matches both name and type of {matching.describe(match)}"


def _together(match: Match, modules: Modules) -> bool:
    only = match.model_copy(update={"op": (), "min_numel": None, "max_numel": None})
    return any(_module_matches(only, name, modules) for name in modules)


def _module_matches(match: Match, name: str, modules: Modules) -> bool:
    return matching.matches(match, Site(name=name, op=""), matching.classes(name, modules))


def resolve(merged: Merged, sites: Sequence[Site], modules: Modules | None = None, *, partial: bool = False) -> Resolution:
    """One decision per site. `modules` (name -> MRO class names) tells a pattern without a site from one that matches nothing.

    partial: `sites` are those of one graph out of several, so a pattern without a site is only noted.
    """
    document = merged.document
    ordered = steps(merged)
    boundary = _boundary(document, sites)
    used: set[tuple[int, int]] = set()
    typed = any(match.type for step in ordered for match in step.rule.match)
    cache: dict[tuple[object, ...], Decision] = {}
    decisions: list[Decision] = []
    notes: list[str] = []
    noted: set[tuple[int, str]] = set()
    for site in sites:
        types = site.types
        if modules and typed:
            types = tuple(type_ for name in site.names for type_ in matching.classes(name, modules, site.types))
        hits = _hits(ordered, site, types, used)
        first_last = boundary.get(site.name, ())
        key = (hits, tuple(step.label for step in first_last))
        if key not in cache:
            cache[key] = _decide(document, [*first_last, *(ordered[n] for n in hits)], notes)
        made = cache[key]
        decisions.append(made)
        if (id(made), site.op) not in noted:
            noted.add((id(made), site.op))
            notes += _without_effect(made, site.op, merged.document.loss_scaling.mode != "none")
    notes += [note for n, step in enumerate(ordered) for note in _unused(step, n, used, modules, document.strict, partial)]
    return Resolution(decisions, list(dict.fromkeys(notes)))


def _hits(ordered: list[Step], site: Site, types: tuple[str, ...], used: set[tuple[int, int]]) -> tuple[int, ...]:
    """Indices of the steps that apply. Every alternative of a list is tried, so that each one that matches counts as used."""
    found = []
    for n, step in enumerate(ordered):
        alternatives = [(n, m) for m, match in enumerate(step.rule.match) if matching.matches(match, site, types)]
        if alternatives:
            used.update(alternatives)
            found.append(n)
    return tuple(found)


def _boundary(document: Document, sites: Sequence[Site]) -> dict[str, tuple[Step, ...]]:
    """The steps for the first and the last layer. A layer that is called twice is one layer."""
    layers = [site.name for site in sites if site.has_weight and site.op in BOUNDARY_OPS]
    found: dict[str, tuple[Step, ...]] = {}
    for key, names in (("first", layers[:1]), ("last", layers[-1:])):
        mode = getattr(document.boundary, key)
        for name in names if mode is not None else ():
            step = Step(Rule(match=(), mode=mode), f"boundary.{key}", f"boundary.{key}")
            found[name] = (*found.get(name, ()), step)
    return found


def _decide(document: Document, applied: list[Step], notes: list[str]) -> Decision:
    """Merge the steps that apply to a site onto the defaults."""
    layer = document.defaults
    mode_by = by = f"defaults ({layer.mode})"
    where, fused = "defaults", False
    for step in applied:
        written = step.rule.model_fields_set
        layer = merge(layer, step.rule)
        if "mode" in written:
            mode_by = step.why
        if "output_fused" in written:
            fused = step.rule.output_fused
        if written - {"match", "optional", "reason", "output_fused"}:
            by, where = step.why, step.place
    if layer.mode == "exempt":
        return Decision(mode="exempt", spec=None, reason=mode_by)
    layer = _settle(layer, where, by, notes, document.strict)
    spec = _site_spec(layer, document)
    if all(getattr(spec, role) is None for role in ROLES):
        return Decision(mode="exempt", spec=None, reason=f"{by}; every role is none")
    if fused:
        spec = spec.replace(output=None)
    return Decision(mode="fp8", spec=spec, output_fused=fused, reason=by, attention=layer.attention, when_not_faster=layer.when_not_faster)


def _without_effect(made: Decision, op: str, loss_scaling: bool) -> Iterator[str]:
    """Notes on what only kernels on a GPU can do, where the reference behaves as by default; and on a choice that may overflow."""
    if made.spec is None:
        return
    if made.when_not_faster == "high_precision":
        yield "when_not_faster: high_precision has no effect on the reference: nothing is timed, FP8 is emulated"
    if made.spec.accumulate != SiteSpec().accumulate and made.spec.arithmetic is None:
        yield "accumulate has no effect on the reference: it always accumulates in fp32"
    if made.spec.weight_transpose != SiteSpec().weight_transpose:
        yield f"weight_transpose: {made.spec.weight_transpose} has no effect on the reference: it transposes as it goes"
    gradients = {name: role for name in ROLES[3:] if (role := getattr(made.spec, name)) is not None}
    for name, role in gradients.items():
        if role.scaling == "delayed" and role.overflow == "nonfinite" and not loss_scaling:
            yield f"{name}: a gradient that outgrows its delayed scale becomes inf, and no loss scaler skips it: write overflow: saturate"
    if made.spec.save_for_backward == "high_precision" and op != "linear":
        yield f"save_for_backward: high_precision has no effect on {op}: it keeps its quantized operands"


def _settle(layer: Layer, where: str, by: str, notes: list[str], strict: bool) -> Layer:
    """One rule says delayed and another says blocks: refused. Blocks on an unscaled role mean nothing, so they are only noted:
    a rule for the blocks of all `*.down_proj` may well meet a layer that an earlier rule made direct.
    """
    for name in ROLES:
        role: Role | None = getattr(layer, name)
        while role is not None and (conflict := role_conflict(role)) is not None:
            if role.scaling == "none" and "granularity" in conflict.mended:
                notes.append(f"{by}: granularity of {name} has no effect where scaling is none")
            else:
                complain(f"{where}.{name}", f"after merging, {conflict.text}", strict)
            role = role.model_copy(update=conflict.mended)
            layer = layer.model_copy(update={name: role})
    return layer


def _site_spec(layer: Layer, document: Document) -> SiteSpec:
    roles = {name: getattr(layer, name) for name in ROLES}
    specs: dict[str, Any] = {name: None if role is None else tensor_spec(role, document.scale) for name, role in roles.items()}
    return SiteSpec(
        **specs,
        gemms=tuple(gemm for gemm in GEMMS if getattr(layer.gemms, gemm) == "fp8"),
        accumulate=_accumulate(layer),
        save_for_backward=layer.save_for_backward,
        weight_transpose=layer.weight_transpose,
        save_activation_inputs=layer.save_activation_inputs,
        weight_cache=layer.weight_cache,
    )


def _accumulate(layer: Layer) -> tuple[str, str, str]:
    """An arithmetic stands in the place of the accumulators that it replaces."""
    wanted = (layer.accumulate.output, layer.accumulate.grad_input, layer.accumulate.grad_weight)
    arithmetic = None if layer.arithmetic is None else layer.arithmetic.arithmetic()
    if arithmetic is None or arithmetic.plain:
        return wanted
    return (arithmetic.text,) * 3 if arithmetic.gradients == "same" else (arithmetic.text, *wanted[1:])


def tensor_spec(role: Role, scale: Scale) -> TensorSpec:
    """A role as a spec. What means nothing there is left out, so that equal work has equal text."""
    spec = TensorSpec(
        format=role.format,
        scaling=role.scaling,
        granularity=role.granularity,
        rounding=role.rounding,
        overflow=role.overflow,
    )
    if role.scaling == "none":
        return spec
    if role.scale_format == "float32":  # e8m0 has a rule of its own
        spec = dataclasses.replace(spec, power_of_two=scale.power_of_two if role.power_of_two is None else role.power_of_two)
    if role.scaling == "delayed":
        return spec
    percentile = TensorSpec.percentile if role.percentile is None else role.percentile
    return dataclasses.replace(
        spec,
        eps=scale.eps,
        scale_format=role.scale_format,
        max_value=role.max_value,
        statistic=role.statistic,
        clip=role.clip,
        percentile=percentile,
    )


def _unused(step: Step, n: int, used: set[tuple[int, int]], modules: Modules | None, strict: bool, partial: bool) -> Iterator[str]:
    """Notes on the alternatives of a step that matched no site; an error if they match nothing at all."""
    for m, match in enumerate(step.rule.match):
        if (n, m) in used or (step.rule.optional and modules is None):
            continue
        text = f"{step.entry} {matching.describe(match)}"
        if _matches_modules(match, modules):
            regex = any(pattern.startswith("re:") for pattern in match.name)
            hint = " (a regular expression selects no subtree)" if regex else ""
            yield Unmatched(f"{text}: matches modules but no quantizable site{hint}")
        elif not step.rule.optional:
            if not partial:
                complain(step.place, f"{matching.describe(match)} matches nothing in the model", strict)
            yield Unmatched(f"{text}: matches nothing")


def _matches_modules(match: Match, modules: Modules | None) -> bool:
    """Without `modules`, `check_names` has seen to every pattern but those for functional sites, op kinds and sizes."""
    if not match.name and not match.type:
        return False
    if modules is None:
        return not match.op and not any(matching.may_be_functional(pattern) for pattern in match.name)
    only = match.model_copy(update={"op": (), "min_numel": None, "max_numel": None})
    return any(_module_matches(only, name, modules) for name in modules)
