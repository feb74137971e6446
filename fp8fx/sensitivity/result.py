"""What a study found: one row per layer, one figure per role. Prints as a table, saves as JSON and as an HTML page, suggests a recipe."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8fx.errors import ModelError, nearest
from fp8fx.recipe import Recipe
from fp8fx.sensitivity.budget import Budget, increase
from fp8fx.sensitivity.files import write_text
from fp8fx.sensitivity.study import Study
from fp8fx.sensitivity.suggest import Suggestion, suggest


@dataclass(frozen=True)
class RoleResult:
    """One tensor of one layer: its format, and what the format did to it, summed over all batches.

    sqnr: dB. underflow, overflow: shares in [0, 1]. amax: of finite elements. exponents: {floor(log2 |x / scale|): elements}.
    range: exponents of the format's smallest subnormal, smallest normal and largest value. See fp8fx.sensitivity.figures.
    """

    role: str
    format: str
    sqnr: float
    underflow: float
    overflow: float
    amax: float
    exponents: dict[int, int] = field(repr=False)
    range: tuple[int, int, int] = field(repr=False)


@dataclass(frozen=True)
class LayerResult:
    """One layer. alone: the loss with this layer in FP8 and all others in high precision. without: with all but this one in FP8."""

    name: str
    op: str
    formats: str
    roles: list[RoleResult]
    alone: float
    without: float | None

    @property
    def sqnr(self) -> float:
        """dB, of the forward role that loses most; NaN where nothing was measured."""
        return _least([role for role in self.roles if not role.role.startswith("grad_")])

    @property
    def gradient_sqnr(self) -> float:
        """The same of the gradient roles."""
        return _least([role for role in self.roles if role.role.startswith("grad_")])

    def __getitem__(self, role: str) -> RoleResult:
        for found in self.roles:
            if found.role == role:
                return found
        known = [found.role for found in self.roles]
        raise ModelError(f"layer {self.name!r} has no role {role!r}; it has: {', '.join(known)}.{nearest(role, known)}")


class Sensitivity:
    """The result of fp8fx.sensitivity.

    layers: in execution order, those that the recipe runs in FP8. high, full: the loss in high precision, and with all layers in FP8.
    """

    def __init__(self, study: Study, layers: list[LayerResult], full: float, notes: list[str]) -> None:
        self._study = study
        self.model, self.recipe = type(study.plain).__name__, study.recipe
        self.batches = len(study.batches)
        self.layers, self.high, self.full, self.notes = layers, study.baseline, full, notes
        self.suggestion: Suggestion | None = None

    def __getitem__(self, name: str) -> LayerResult:
        """One layer, by name. Raises ModelError for one that is not among `layers`."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = [layer.name for layer in self.layers]
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ModelError(f"no layer {name!r} was measured; layers in FP8 are: {some}.{nearest(name, known)}")

    @property
    def ranking(self) -> list[LayerResult]:
        """Layers by what they alone add to the loss, the worst first; at equal losses the lower SQNR first. NaN is the worst."""
        return sorted(self.layers, key=lambda layer: (-self.effect(layer), layer.sqnr if not math.isnan(layer.sqnr) else math.inf))

    @property
    def worst(self) -> LayerResult:
        return self.ranking[0]

    def _layer(self, layer: LayerResult | str) -> LayerResult:
        return layer if isinstance(layer, LayerResult) else self[layer]

    def effect(self, layer: LayerResult | str) -> float:
        """What the layer (or the one of that name) alone in FP8 adds to the loss in high precision; inf where the loss is not finite."""
        layer = self._layer(layer)
        return layer.alone - self.high if math.isfinite(layer.alone) else math.inf

    def gain(self, layer: LayerResult | str) -> float | None:
        """What the loss in FP8 falls by if this layer (or the one of that name) alone is taken out; None where it was not measured."""
        layer = self._layer(layer)
        return None if layer.without is None else self.full - layer.without

    def suggest(self, budget: Any) -> Recipe:
        """A recipe that extends the one given by exempting layers, and whose measured loss meets `budget` ('1%', or an increase: 0.02).

        Kept in `suggestion`, with the figures. Raises ModelError, with them, where not even one layer in FP8 meets it; `suggestion` is
        None then.
        """
        self.suggestion = None
        self.suggestion = suggest(self._study, [(layer.name, self.effect(layer)) for layer in self.ranking], self.full, budget)
        return self.suggestion.recipe

    def save_suggestion(self, path: str | os.PathLike[str], budget: Any = None) -> None:
        """Write the last suggestion as YAML, whole or not at all; with `budget` the one for it, which is made first unless it is the last.

        Raises ModelError without a suggestion and where none meets `budget`, FP8Error where it cannot be written.
        """
        if budget is not None and (self.suggestion is None or self.suggestion.budget != Budget.parse(budget)):
            self.suggest(budget)
        if self.suggestion is None:
            raise ModelError(
                "there is no suggestion to save: suggest(budget) was not called, or found none; call it, or save_suggestion(path, budget)"
            )
        write_text(path, self.suggestion.text())

    def table(self) -> Table:
        """One row per layer and role, in execution order."""
        table = Table(title=f"sensitivity of {self.model}, recipe {self.recipe.name}", title_justify="left", box=None, pad_edge=False)
        for heading in ("layer", "role", "format"):
            table.add_column(heading, no_wrap=heading == "layer", overflow="fold")
        for heading in ("SQNR dB", "underflow", "overflow", "loss, alone in FP8", "loss, all but it"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            gone = "" if layer.without is None else f"{layer.without - self.full:+.3g}"
            losses = [f"{layer.alone - self.high:+.3g}", gone]
            for role in layer.roles:
                shares = [f"{share:.2%}" if share else "0" for share in (role.underflow, role.overflow)]
                table.add_row(layer.name if role is layer.roles[0] else "", role.role, role.format, f"{role.sqnr:.1f}", *shares, *losses)
                losses = ["", ""]
        return table

    def totals(self) -> list[str]:
        lines = [
            f"loss over {self.batches} batch{'es' * (self.batches != 1)}: {self.high:.6g} in high precision, {self.full:.6g} with "
            f"{len(self.layers)} layers in FP8: {increase(self.full, self.high)}",
            f"worst: {', '.join(f'{layer.name} {layer.alone - self.high:+.3g}' for layer in self.ranking[:3])} (alone in FP8)",
        ]
        if self.suggestion is not None:
            lines.append(str(self.suggestion))
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=160, no_color=True)
        console.print(self.table())
        for line in self.totals():
            console.print(line, highlight=False, markup=False)
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are the strings "inf", "-inf" and "nan", which JSON has no other form for."""
        layers = [
            {
                "name": layer.name,
                "op": layer.op,
                "formats": layer.formats,
                "loss_alone": layer.alone,
                "loss_without": layer.without,
                "roles": [{**vars(role), "range": list(role.range)} for role in layer.roles],
            }
            for layer in self.layers
        ]
        data = {"model": self.model, "recipe": self.recipe.name, "batches": self.batches, "loss_high": self.high, "loss_full": self.full}
        made = None if self.suggestion is None else self.suggestion.to_dict()
        return _finite({**data, "layers": layers, "suggestion": made, "notes": self.notes})  # type: ignore[no-any-return]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` to a file. Raises FP8Error where it cannot be written; what was there is then there still."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with pictures that needs no other file, and no network. Raises FP8Error as `to_json` does."""
        from fp8fx.sensitivity.page import page  # pictures are drawn for those who ask for them

        write_text(path, page(self))


def _least(roles: list[RoleResult]) -> float:
    return min((role.sqnr for role in roles if not math.isnan(role.sqnr)), default=math.nan)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
