"""`Recipe`: what the rest of fp8fx sees of this package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fp8fx.errors import RecipeError
from fp8fx.recipe import resolve as resolving
from fp8fx.recipe.grammar import Document, Layer, Match, Role, Rule
from fp8fx.recipe.load import Loaded, Merged, Place, follow, is_path, load, merge_chain, shipped
from fp8fx.recipe.match import Modules, Site
from fp8fx.recipe.resolve import Resolution
from fp8fx.recipe.sections import Boundary, Delayed, LossScaling, Model, Scale
from fp8fx.recipe.source import from_dict
from fp8fx.spec import ROLES

Patterns = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """What to quantize and how: an immutable value, equal to any recipe that decides the same way by the same rules.

    name: a shipped name, the stem of a file, or "<dict>". origin: where it was loaded from, for messages.
    Make one with `Recipe.load`; every mistake is a RecipeError that names file, line and key.
    """

    name: str
    origin: str
    _merged: Merged = field(repr=False)

    @staticmethod
    def load(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """A shipped name, a path (has a separator or ends in .yaml or .yml), a dict, or a Recipe, which is returned as it is."""
        if isinstance(source, Recipe):
            return source
        chain = load(source)
        origin = chain[-1].source.label
        if isinstance(source, Mapping):
            name = origin
        else:
            name = Path(origin).stem if is_path(os.fsdecode(source)) or not isinstance(source, str) else source
        return Recipe(name, origin, merge_chain(chain))

    @staticmethod
    def shipped() -> list[str]:
        """Names of the recipes that come with fp8fx."""
        return shipped()

    @staticmethod
    def schema() -> dict[str, Any]:
        """The JSON schema of a recipe file."""
        schema = Document.model_json_schema()
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fp8fx recipe"}

    @property
    def loss_scaling(self) -> LossScaling:
        return self._merged.document.loss_scaling

    @property
    def delayed(self) -> Delayed:
        return self._merged.document.delayed

    @property
    def keeps_scales(self) -> bool:
        """Some role's scaling is delayed, so that a model has scales to keep."""
        document = self._merged.document
        roles = [getattr(layer, name) for layer in (document.defaults, *document.rules) for name in ROLES]
        return any(role is not None and role.scaling == "delayed" for role in roles)

    @property
    def scale(self) -> Scale:
        return self._merged.document.scale

    @property
    def boundary(self) -> Boundary:
        return self._merged.document.boundary

    @property
    def seed(self) -> int:
        return self._merged.document.seed

    @property
    def strict(self) -> bool:
        return self._merged.document.strict

    def check_names(self, modules: Modules) -> None:
        """Raise RecipeError if a name or type pattern matches none of `modules` (name -> class names of the MRO; root '').

        Op kinds, sizes, and names of functional sites (`attn.matmul_1`) wait for `resolve`. Under `strict: false` it warns.
        """
        resolving.check_names(self._merged, modules)

    def resolve(self, sites: Sequence[Site], modules: Modules | None = None, *, partial: bool = False) -> Resolution:
        """One Decision per site, sites in execution order.

        modules: as for `check_names`; with it a `type` also selects the sites inside a module of that type.
        partial: `sites` belong to one graph of several, so patterns that match none of them are noted and not refused.
        """
        return resolving.resolve(self._merged, sites, modules, partial=partial)

    def with_overrides(self, exempt: Patterns = (), output_fused: Patterns = ()) -> Recipe:
        """This recipe with more entries in `exempt` and `output_fused`; what `fp8fx.compile(..., exempt=[...])` adds."""
        extra = {"exempt": _listed(exempt), "output_fused": _listed(output_fused)}
        if not any(extra.values()):
            return self
        added = merge_chain([_checked(extra)])
        document, places = self._merged.document, dict(self._merged.places)
        changes = {}
        for key in extra:
            old = getattr(document, key)
            changes[key] = old + getattr(added.document, key)
            places |= {(key, len(old) + n): Place(f"{key}[{n}] given beside the recipe", key) for n in range(len(extra[key]))}
        return Recipe(self.name, self.origin, Merged(document.model_copy(update=changes), places))

    def with_boundary(self, *, first: bool, last: bool) -> Recipe:
        """This recipe for a part of a model: without `boundary.first` or `boundary.last` where the part has not that end."""
        boundary = self.boundary
        kept = Boundary(first=boundary.first if first else None, last=boundary.last if last else None)
        if kept == boundary:
            return self
        return Recipe(self.name, self.origin, Merged(self._merged.document.model_copy(update={"boundary": kept}), self._merged.places))

    def to_dict(self) -> dict[str, Any]:
        """The merged recipe as plain data, complete and without `extends`; `Recipe.load` reads it back. Paths of tables are absolute."""
        document = self._merged.document
        data: dict[str, Any] = {"version": 1, "defaults": _layer(document.defaults, Layer.model_fields, complete=True)}
        boundary = {key: mode for key, mode in document.boundary if mode is not None}
        optional = {
            "boundary": boundary,
            "rules": [_rule(rule) for rule in document.rules],
            "exempt": [_match(match) for match in document.exempt],
            "output_fused": [_match(match) for match in document.output_fused],
        }
        data |= {key: value for key, value in optional.items() if value}
        data |= {key: getattr(document, key).model_dump() for key in ("delayed", "scale", "loss_scaling")}
        return data | {"seed": document.seed, "strict": document.strict}

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as YAML: the whole recipe, nothing left to look up elsewhere. Paths of tables are from the file's folder."""
        data, folder = self.to_dict(), os.path.dirname(os.path.abspath(os.fsdecode(path)))
        for layer in (data["defaults"], *data.get("rules", ())):
            _move_table(layer.get("arithmetic"), folder)
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=130, allow_unicode=True)
        try:
            Path(path).write_text(f"# {self.name}: every key written out, `extends` merged in.\n{text}", encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{os.fspath(path)}: cannot be written: {error}") from None

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def __repr__(self) -> str:
        document = self._merged.document
        counts = {"rules": document.rules, "exempt": document.exempt, "output_fused": document.output_fused}
        sizes = (f"{len(entries)} {key}" for key, entries in counts.items() if entries)
        parts = [document.defaults.mode, *("1 rule" if size == "1 rules" else size for size in sizes)]
        return f"<Recipe {self.name}: {', '.join(parts)}>"


def _listed(patterns: Patterns) -> list[Any]:
    """Anything but a string, a mapping or an iterable becomes one entry, for the grammar to refuse."""
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str | Mapping) else [patterns]


def _checked(extra: dict[str, list[Any]]) -> Loaded:
    return follow(from_dict({key: entries for key, entries in extra.items() if entries}, label="given beside the recipe"))[-1]


def _move_table(study: Any, folder: str) -> None:
    """The path of a layer's table as one from `folder`; absolute as it is where the two share nothing but the root of the file system."""
    table = study.get("multiplier", "") if isinstance(study, dict) else ""
    if not table.endswith(".npy"):
        return
    try:
        shared = os.path.commonpath([folder, table])
    except ValueError:  # on another drive
        return
    if shared != os.path.dirname(shared):
        path = Path(os.path.relpath(table, folder)).as_posix()
        study["multiplier"] = f"./{path}" if path.startswith("~") else path


def _layer(layer: Layer, keys: Iterable[str], *, complete: bool = False) -> dict[str, Any]:
    """The keys of a layer as plain data; `rounding` and `overflow` are left out where they were never written."""
    found: dict[str, Any] = {}
    for key in Layer.model_fields:
        value = getattr(layer, key)
        if key not in keys or (key in ("rounding", "overflow") and value is None):
            continue
        found[key] = _plain(value, complete)
    return found


def _plain(value: Any, complete: bool = False) -> Any:
    if isinstance(value, Model):
        entries = value.model_dump(exclude_unset=not complete).items()
        return {key: _plain(entry) for key, entry in entries if not (complete and _silent(value, key, entry))}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return "none" if value is None else value


def _silent(model: Model, key: str, value: object) -> bool:
    """A key that few roles have, and that says what leaving it out says."""
    few = ("max_value", "statistic", "percentile", "clip", "scale_format", "power_of_two")
    return isinstance(model, Role) and key in few and value == Role.model_fields[key].default


def _rule(rule: Rule) -> dict[str, Any]:
    patterns = [_match(match) for match in rule.match]
    data: dict[str, Any] = {"match": patterns[0] if len(patterns) == 1 else patterns, **_layer(rule, rule.model_fields_set)}
    if "output_fused" in rule.model_fields_set:
        data["output_fused"] = rule.output_fused
    data |= {"optional": True} if rule.optional else {}
    return data | ({"reason": rule.reason} if rule.reason else {})


def _match(match: Match) -> Any:
    """A bare pattern where there is only one name."""
    found = {key: _plain(value) for key, value in match if value not in ((), None)}
    found = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in found.items()}
    return found["name"] if set(found) == {"name"} and isinstance(found["name"], str) else found
