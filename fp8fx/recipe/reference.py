"""The tables of docs/recipes.md, made from the JSON schema of the grammar; a test holds the page to them.

`python -m fp8fx.recipe.reference` prints them, and with the argument `schema` it prints the schema.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from fp8fx.recipe.recipe import Recipe
from fp8fx.spec import ROLES

SECTIONS = ("Document", "Layer", "Role", "Gemms", "Accumulate", "Rule", "Match", "Boundary", "Delayed", "Scale", "LossScaling")

BY_MODE = (*ROLES, "rounding", "overflow")


def table(section: str) -> str:
    """One Markdown table: key, allowed values, default, meaning. A Rule's table leaves out the keys it shares with Layer."""
    schema = Recipe.schema()
    models = {**schema["$defs"], "Document": schema}
    shared = models["Layer"]["properties"] if section == "Rule" else {}
    rows = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, entry in models[section]["properties"].items():
        if key not in shared:
            cells = (f"`{key}`", _allowed(entry), _default(section, key, entry), entry["description"])
            rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def _allowed(entry: dict[str, Any]) -> str:
    """Words in code font, everything else in prose."""
    if "enum" in entry:
        return ", ".join(f"`{word}`" for word in entry["enum"] if word is not None)
    if "anyOf" in entry:
        choices = [choice for choice in entry["anyOf"] if choice.get("type") != "null"]
        many = next((choice for choice in choices if choice.get("items") in choices), None)
        if many is not None:
            return f"{_allowed(many['items'])}; or a list of such"
        return " or ".join(_allowed(choice) for choice in choices)
    if "$ref" in entry:
        return f"a mapping ({entry['$ref'].rsplit('/', 1)[-1]})"
    return _KINDS[entry["type"]](entry)


def _number(entry: dict[str, Any]) -> str:
    kind = "a whole number" if entry["type"] == "integer" else "a number"
    bounds = [f"from {entry['minimum']} on"] if "minimum" in entry else []
    bounds += [f"above {entry['exclusiveMinimum']}"] if "exclusiveMinimum" in entry else []
    bounds += [f"below {entry['exclusiveMaximum']}"] if "exclusiveMaximum" in entry else []
    bounds += [f"up to {entry['maximum']}"] if "maximum" in entry else []
    return f"{kind} {', '.join(bounds)}".strip()


_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "array": lambda entry: "`[rows, columns]`",
    "integer": _number,
    "number": _number,
    "boolean": lambda entry: "`true`, `false`",
    "object": lambda entry: "`{group: N}`" if "properties" in entry else f"a mapping of step to {_allowed(entry['additionalProperties'])}",
    "string": lambda entry: "text",
}


def _default(section: str, key: str, entry: dict[str, Any]) -> str:
    if section == "Role" or (section == "Layer" and key in BY_MODE):
        return "by mode"
    if section == "LossScaling" and key == "mode":
        return "by `defaults.mode`"
    if section == "Rule" and "default" not in entry:
        return "must be written" if key == "match" else "unchanged"
    value = entry.get("default")
    if value in (None, [], {}, "") or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main(arguments: list[str]) -> None:
    if arguments == ["schema"]:
        print(json.dumps(Recipe.schema(), indent=2))
        return
    for name in SECTIONS:
        print(f"### {name}\n\n{table(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
