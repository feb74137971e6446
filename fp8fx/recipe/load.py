"""From a name, a path or a dict to one merged recipe: find, read, validate, follow `extends`, merge.

    load(name) -> [base document, ..., this document] -> merge_chain -> Merged

Every mistake is a RecipeError that names file, line and key.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fp8fx.errors import FP8Warning, RecipeError, nearest
from fp8fx.recipe import source as sources
from fp8fx.recipe.checks import document_problems, match_problems, merged_problems
from fp8fx.recipe.grammar import Document, Layer, Match, Rule
from fp8fx.recipe.merge import merge, preset
from fp8fx.recipe.sections import Boundary, LossScaling
from fp8fx.recipe.source import KeyPath, Source
from fp8fx.recipe.values import switch

SHIPPED = resources.files("fp8fx.recipes")


@dataclass(frozen=True)
class Loaded:
    """One validated document and where it was written."""

    document: Document
    source: Source


def shipped() -> list[str]:
    """Names of the recipes that come with fp8fx."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def is_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.endswith((".yaml", ".yml"))


def find(name: object, folder: Path) -> Source:
    """Read what a recipe argument or an `extends` names."""
    if isinstance(name, Mapping):
        return sources.from_dict(name)
    if isinstance(name, os.PathLike):
        path = os.fspath(name)
        return sources.from_file(folder / (path if isinstance(path, str) else os.fsdecode(path)))
    if not isinstance(name, str):
        raise RecipeError(f"a recipe is a shipped name, a path, a dict or a Recipe; got {sources.shorten(name)}")
    if is_path(name):
        return sources.from_file(folder / os.path.expanduser(name))
    if name not in shipped():
        files = [f"{name}{ending}" for ending in (".yaml", ".yml") if os.path.isfile(folder / f"{name}{ending}")]
        close = f" Did you mean {files[0]!r}?" if files else nearest(name.lower(), shipped())
        raise RecipeError(f"no shipped recipe is called {name!r}; allowed: {', '.join(shipped())}, or a path that ends in .yaml.{close}")
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    return sources.from_text(text, f"recipes/{name}.yaml", Path())


def load(name: object) -> list[Loaded]:
    """The chain of documents, the one that extends nothing first."""
    return follow(find(name, Path()))


def follow(source: Source, chain: tuple[str, ...] = (), strict: bool | None = None) -> list[Loaded]:
    """The chain that ends in `source`; `chain` names the documents that led here, `strict` is what they say."""
    strict = _written_strict(source) if strict is None else strict
    chain = (*chain, _identity(source))
    base: list[Loaded] = []
    name = source.data.get("extends")
    if name is None and "extends" in source.data:
        raise source.error(("extends",), f"is empty: write {', '.join(shipped())} or the path of a file, or leave the key out")
    if name is not None:
        base = follow(_extended(source, name, chain), chain, strict)
    if strict is None:
        strict = base[-1].document.strict if base else True
    return [*base, Loaded(_validate(source, strict), source)]


def _written_strict(source: Source) -> bool | None:
    """What a document says before it is validated; a wrong value is found later."""
    try:
        return None if "strict" not in source.data else switch(source.data["strict"])
    except ValueError:
        return None


def _identity(source: Source) -> str:
    return os.path.abspath(source.label) if os.path.exists(source.label) else source.label


def _extended(source: Source, name: object, chain: tuple[str, ...]) -> Source:
    if not isinstance(name, str | os.PathLike):
        raise source.error(("extends",), f"got {sources.shorten(name)}; allowed: a shipped name or the path of a file")
    try:
        found = find(name, source.folder)
    except RecipeError as error:
        raise source.error(("extends",), str(error)) from None
    if _identity(found) in chain:
        circle = " -> ".join([*chain, _identity(found)])
        raise source.error(("extends",), f"got {str(name)!r}, which is a circle: {circle}")
    return found


def _validate(source: Source, strict: bool) -> Document:
    """The document, or a RecipeError with every problem on its own line. The extending recipe's `strict` counts, not its own."""
    data: dict[str, Any] = copy.copy(source.data)
    if isinstance(data.get("extends"), os.PathLike):
        data["extends"] = os.fspath(data["extends"])
    try:
        document = Document.model_validate(data, context={"folder": source.folder})
    except ValidationError as error:
        document = _without_unknown(source, data, error, strict)
    for path, problem in match_problems(document):
        raise source.error(path, problem)
    for path, problem in document_problems(document):
        complain(source.place(path), problem, strict)
    return document.model_copy(update={"strict": strict})


def complain(where: str, problem: str, strict: bool) -> None:
    """A RecipeError, or under `strict: false` an FP8Warning."""
    if strict:
        raise RecipeError(f"{where}: {problem}")
    warnings.warn(f"{where}: {problem} (strict: false)", FP8Warning, stacklevel=2)


def _without_unknown(source: Source, data: dict[str, Any], error: ValidationError, strict: bool) -> Document:
    """Under `strict: false` unknown keys are dropped with a warning; anything else wrong is an error all the same."""
    errors = error.errors(include_url=False, include_input=False)
    if strict or any(entry["type"] != "extra_forbidden" for entry in errors):
        lines = list(dict.fromkeys(f"{source.place(entry['loc'])}: {_problem(source, dict(entry))}" for entry in errors))
        raise RecipeError("\n".join(lines))
    data = copy.deepcopy(data)
    trimmed = Source(source.label, data, source.folder, source.lines)
    for entry in errors:
        complain(source.place(entry["loc"]), _problem(source, dict(entry)), strict=False)
        owner: Any = trimmed.value(entry["loc"][:-1])
        owner.pop(entry["loc"][-1], None)
    return Document.model_validate(data, context={"folder": source.folder})


def _problem(source: Source, entry: dict[str, Any]) -> str:
    """One pydantic error in our words."""
    loc: KeyPath = entry["loc"]
    if entry["type"] == "extra_forbidden":
        known = list(_keys_at(loc[:-1]))
        hint = nearest(loc[-1], known)
        if len(loc) == 1 and loc[0] in Layer.model_fields:
            hint = f" Did you mean 'defaults.{loc[0]}'?"
        return f"unknown key; allowed: {', '.join(known)}{'.' if hint else ''}{hint}"
    if entry["type"] == "missing":
        return "is missing; every rule says what it matches"
    if entry["type"] == "model_type":
        return f"got {sources.shorten(source.value(loc))}; allowed: a mapping with the keys {', '.join(_keys_at(loc))}"
    if entry["type"] == "value_error":
        return str(entry["ctx"]["error"])
    return f"got {sources.shorten(source.value(loc))}; allowed: {_EXPECTED.get(entry['type'], entry['msg'])}"


_EXPECTED = {
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
    "invalid_key": "keys that are words",
}


def _keys_at(loc: KeyPath) -> Iterable[str]:
    """The keys that the model at `loc` knows."""
    model: type[BaseModel] = Document
    for part in loc:
        if isinstance(part, str):
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


Written = tuple[Source, KeyPath]  # an entry as it stands in its own document


@dataclass(frozen=True)
class Place:
    """Where an entry of a list was written: `text` in errors, `entry` in reasons, where the entry's pattern follows."""

    text: str
    entry: str


@dataclass(frozen=True)
class Merged:
    """A chain of documents as one: `document` extends nothing and its defaults are complete.

    `places` says, per entry of rules, exempt and output_fused, which file and line it came from.
    """

    document: Document
    places: Mapping[KeyPath, Place]


def merge_chain(chain: list[Loaded]) -> Merged:
    """Merge, base first. Where a document is extended, its exempt and output_fused lists become rules before those that follow."""
    defaults = preset("hybrid")
    rules: list[tuple[Rule, Written]] = []
    sugar: dict[str, list[tuple[Match, Written]]] = {"exempt": [], "output_fused": []}
    for loaded in chain:
        document, source = loaded.document, loaded.source
        for key, entries in sugar.items():
            rules += [(sugar_rule(key, match), place) for match, place in entries]
        defaults = merge(defaults, document.defaults)
        rules += [(rule, (source, ("rules", n))) for n, rule in enumerate(document.rules)]
        sugar = {key: [(match, (source, (key, n))) for n, match in enumerate(getattr(document, key))] for key in sugar}
    top = chain[-1].document
    merged = Document.model_construct(
        version=1,
        extends=None,
        defaults=defaults,
        rules=tuple(rule for rule, _ in rules),
        exempt=tuple(match for match, _ in sugar["exempt"]),
        output_fused=tuple(match for match, _ in sugar["output_fused"]),
        boundary=_section(chain, "boundary", Boundary()),
        delayed=_section(chain, "delayed", Document().delayed),
        scale=_section(chain, "scale", Document().scale),
        loss_scaling=_loss_scaling(chain, defaults.mode),
        seed=next((one.document.seed for one in reversed(chain) if "seed" in one.document.model_fields_set), 0),
        strict=top.strict,
    )
    written: dict[KeyPath, Written] = {("rules", n): place for n, (_, place) in enumerate(rules)}
    written |= {(key, n): place for key, entries in sugar.items() for n, (_, place) in enumerate(entries)}
    for path, problem in merged_problems(defaults, merged.rules, merged.loss_scaling.mode):
        source, start = written.get(path[:2], (_writer(chain, path), path[:2]))
        complain(source.place((*start, *path[2:])), problem, top.strict)
    return Merged(merged, {path: Place(source.place(start), source.entry(start)) for path, (source, start) in written.items()})


def _writer(chain: list[Loaded], path: KeyPath) -> Source:
    """The last document that writes the key, or most of its path."""
    return max((one.source for one in reversed(chain)), key=lambda source: len(source.written(path)))


def sugar_rule(key: str, match: Match) -> Rule:
    """The rule that an entry of `exempt` or `output_fused` stands for."""
    return Rule(match=(match,), mode="exempt") if key == "exempt" else Rule(match=(match,), output_fused=True)


def _section(chain: list[Loaded], key: str, section: Any) -> Any:
    """A section of plain keys, the keys written last winning."""
    for loaded in chain:
        keys = getattr(loaded.document, key)
        section = section.model_copy(update={name: getattr(keys, name) for name in keys.model_fields_set})
    return section


def _loss_scaling(chain: list[Loaded], mode: str) -> LossScaling:
    """`mode` not written anywhere follows `defaults.mode`; other keys without effect are refused, since FP8 gradients hang on it."""
    section: LossScaling = _section(chain, "loss_scaling", LossScaling())
    if any("mode" in one.document.loss_scaling.model_fields_set for one in chain):
        return section
    if mode != "direct" and (keys := sorted(chain[-1].document.loss_scaling.model_fields_set)):
        problem = f"has no effect: loss scaling is off, the default with defaults.mode {mode}; write mode: dynamic beside it"
        complain(chain[-1].source.place(("loss_scaling", keys[0])), problem, chain[-1].document.strict)
    return section.model_copy(update={"mode": "dynamic" if mode == "direct" else "none"})
