"""What a search found: a table for people, and a recipe that `fp8fx.compile` takes and a user can read and edit."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fp8fx.errors import RecipeError
from fp8fx.recipe import Recipe
from fp8fx.search.candidates import Candidate, Found
from fp8fx.spec import Granularity, TensorSpec


@dataclass(frozen=True)
class Choice:
    """What was chosen for one role of one layer. `error` is of the tensor, or of the layer's output under objective `output`.

    largest: the largest magnitude seen. fixed: max_value is written down; else the scale follows each tensor, times `fraction`.
    """

    layer: str
    op: str
    role: str
    best: Found
    runner_up: Found | None
    largest: float
    fixed: bool
    base: TensorSpec

    @property
    def candidate(self) -> Candidate:
        return self.best.candidate

    @property
    def max_value(self) -> float:
        """The largest value of the grid, to six digits: what the recipe says."""
        return six_digits(self.candidate.fraction * self.largest)

    def entry(self) -> dict[str, Any]:
        """The role as a recipe writes it."""
        value = ("max_value", self.max_value) if self.fixed else ("clip", self.candidate.fraction)
        return role_entry(self.candidate.format, self.candidate.granularity, value, self.base)


def role_entry(format: str, granularity: Granularity, value: tuple[str, float], base: TensorSpec) -> dict[str, Any]:
    """A role with a found or learned grid. What of the base would change the grid is taken back: float32 scales, nearest_even, saturate."""
    block = granularity if isinstance(granularity, str) else list(granularity)
    found = {"format": format, "granularity": block, "scaling": "fixed" if value[0] == "max_value" else "current", value[0]: value[1]}
    plain = {"scale_format": "float32", "power_of_two": False, "overflow": "saturate", "rounding": "nearest_even"}
    return found | {key: value for key, value in plain.items() if getattr(base, key) != value}


def six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def decibels(found: Found | None) -> str:
    return "" if found is None else f"{found.sqnr:.2f} dB"


def rule_of(name: str, parameters: Collection[str]) -> dict[str, Any]:
    """The beginning of a layer's rule. A product that is named after a parameter is no module, which a rule must say."""
    return {"match": name, "optional": True} if name in parameters else {"match": name}


def rules_of(choices: Sequence[Choice], parameters: Collection[str] = ()) -> list[dict[str, Any]]:
    """One rule per layer, in execution order. parameters: names of the model's."""
    rules: dict[str, dict[str, Any]] = {}
    for choice in choices:
        rule = rules.setdefault(choice.layer, rule_of(choice.layer, parameters))
        rule[choice.role] = choice.entry()
    for name, rule in rules.items():
        said = [f"{c.role} {decibels(c.best)}" for c in choices if c.layer == name]
        rule["reason"] = "searched: " + ", ".join(said)
    return list(rules.values())


def document_of(base: Recipe, exempt: Sequence[Any], rules: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe as plain data: `extends` where the base is a shipped one or a file, else the base written out."""
    known = base.name in Recipe.shipped() and base == Recipe.load(base.name)
    data: dict[str, Any] = {"version": 1, "extends": base.name} if known else base.to_dict()
    data["rules"] = [*data.get("rules", []), *rules]
    if exempt:
        data["exempt"] = [*data.get("exempt", []), *exempt]
    return data


def yaml_text(data: dict[str, Any], header: Sequence[str]) -> str:
    """A recipe file: the header as comments, then one line per rule where it fits."""
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return comments + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=150, allow_unicode=True)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write the whole file or nothing: what was there before stays until the new one is complete. Raises RecipeError."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise RecipeError(f"{os.fspath(path)}: cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclass(frozen=True)
class SearchResult:
    """The choices of a search; `recipe` is what they make of the base recipe. Prints as a table.

    left: layers that were not searched, and why. parameters: names of the model's, of which some name a layer.
    """

    choices: list[Choice]
    base: Recipe
    objective: str
    exempt: list[Any] = field(default_factory=list)
    said: str = ""
    left: list[str] = field(default_factory=list)
    parameters: frozenset[str] = frozenset()

    def __getitem__(self, key: tuple[str, str]) -> Choice:
        """The choice of (layer, role)."""
        for choice in self.choices:
            if (choice.layer, choice.role) == key:
                return choice
        raise KeyError(key)

    @property
    def document(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return document_of(self.base, self.exempt, rules_of(self.choices, self.parameters))

    @property
    def recipe(self) -> Recipe:
        return Recipe.load(self.document)

    def table(self) -> Table:
        error = "error of the output" if self.objective == "output" else "error"
        table = Table(title=f"fp8fx search, {self.said}", title_justify="left", box=None, pad_edge=False)
        for heading in ("layer", "role", "format", "max value", "of absmax", "MSE", f"SQNR ({error})", "runner-up"):
            table.add_column(heading, justify="left" if heading in ("layer", "role", "format", "runner-up") else "right", no_wrap=True)
        for c in self.choices:
            other = "" if c.runner_up is None else f"{c.runner_up.candidate.text} {decibels(c.runner_up)}"
            row = (c.candidate.text, f"{c.max_value:g}", f"{c.candidate.fraction:g}", f"{c.best.mse:.3g}", decibels(c.best), other)
            table.add_row(c.layer, c.role, *row)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=160, no_color=True)
        console.print(self.table())
        for line in self.left:
            console.print(f"not searched: {line}", highlight=False, markup=False)
        return out.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML, with the table as comments above it: the whole file or, with RecipeError, nothing."""
        lines = [
            "Found by fp8fx.search; edit it as any recipe. max_value is the largest value of a role's grid, clip a factor on the largest",
            "magnitude of each tensor (row, block); both are kept by hand-written changes of the format. docs/search.md",
            *str(self).rstrip().split("\n"),
        ]
        self.recipe  # noqa: B018  a recipe that does not load is not written
        write(path, yaml_text(self.document, lines))
