"""One HTML page of a study that needs no other file: what it found at a glance, pictures, and every number. Light and dark."""

from __future__ import annotations

import math
from html import escape

from fp8fx.sensitivity.budget import increase
from fp8fx.sensitivity.charts import histogram, layer_bars
from fp8fx.sensitivity.result import LayerResult, Sensitivity

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2330; --soft: #5c6675; --line: #d9dee6; --panel: #f5f7fa;
  --sqnr: #3b76c4; --warn: #d9822b; --worse: #c8453b; --better: #3f9a63; --normal: #dce8f7; --subnormal: #eef4fb; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e6e9ee; --soft: #9aa4b2; --line: #323945; --panel: #1c2027;
  --sqnr: #6ea3e8; --warn: #e8a15a; --worse: #ec7a70; --better: #6cc48f; --normal: #23334a; --subnormal: #1b2532; } }
body { margin: 0 auto;
  max-width: 1020px; padding: 24px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 6px; } p { margin: 4px 0; } .soft { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; min-width: 130px; }
.card b { display: block; font-size: 19px; } .card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } .left { text-align: left; }
details { border-bottom: 1px solid var(--line); padding: 6px 0; } summary { cursor: pointer; }
.grid { display: flex;
  flex-wrap: wrap; gap: 14px; padding: 8px 0; } figure { margin: 0; } figcaption { font-size: 12px; color: var(--soft); }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .name { text-anchor: end; } svg .head { fill: var(--soft); }
svg .number, svg .tick { fill: var(--soft); font-size: 11px; } svg .tick { text-anchor: middle; }
.sqnr, .count { fill: var(--sqnr); } .low { fill: var(--warn); } .worse, .lost { fill: var(--worse); } .better { fill: var(--better); }
.normal { fill: var(--normal); } .subnormal { fill: var(--subnormal); }
.axis { stroke: var(--soft); } .mark { stroke: var(--ink); stroke-width: 2; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; font-size: 13px; }
"""
OPEN = 3  # layers whose histograms are shown at once: the worst ones


def page(result: Sensitivity) -> str:
    """The whole page, as text."""
    title = f"FP8 sensitivity of {result.model}, recipe {result.recipe.name}"
    parts = [_head(result, title), _bars(result), _suggestion(result), _histograms(result), _table(result), _notes(result)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{''.join(parts)}</body></html>\n"
    )


def _head(result: Sensitivity, title: str) -> str:
    worst = result.worst
    cards = {
        "loss in high precision": f"{result.high:.6g}",
        "loss in FP8": f"{result.full:.6g}",
        "increase": increase(result.full, result.high),
        "layers in FP8": str(len(result.layers)),
        "worst layer, alone": f"{worst.name} {worst.alone - result.high:+.3g}",
    }
    if result.suggestion is not None:
        cards["suggested: layers exempt"] = str(len(result.suggestion.exempt))
        cards[f"its increase (budget {result.suggestion.budget})"] = increase(result.suggestion.loss, result.high)
    drawn = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in cards.items())
    batches = f"{result.batches} batch{'es' * (result.batches != 1)}"
    return f'<h1>{escape(title)}</h1><p class="soft">Losses are means over {batches}.</p><div class="cards">{drawn}</div>'


def _bars(result: Sensitivity) -> str:
    mark = "" if result.layers[0].without is None else "; the mark is what exempting only this layer takes off the loss of the whole recipe"
    return (
        "<h2>Layers, in the order they run</h2>"
        '<p class="soft">Left: the signal over the error of the worst of input, weight and output; orange below 20 dB; the mark is '
        f"the worst gradient. Right: what this layer alone in FP8 adds to the loss (red) or takes off (green){mark}.</p>"
        f'<div class="scroll">{layer_bars(result)}</div>'
    )


def _suggestion(result: Sensitivity) -> str:
    if result.suggestion is None:
        return ""
    return f"<h2>Suggested recipe</h2><pre>{escape(result.suggestion.text())}</pre>"


def _histograms(result: Sensitivity) -> str:
    drawn = "".join(_layer(result, layer, number < OPEN) for number, layer in enumerate(result.ranking))
    return (
        "<h2>Exponents after scaling, the worst layers first</h2>"
        '<p class="soft">Elements by floor(log2 |x / scale|). Shaded: the normal range of the format, and lighter its subnormals, with the '
        "exponents of their ends below. Red bars lie outside: to the left they become zero or the smallest value, to the right the largest "
        f"or inf. Zeros are not counted.</p>{drawn}"
    )


def _layer(result: Sensitivity, layer: LayerResult, shown: bool) -> str:
    figures = "".join(
        f"<figure>{histogram(role)}<figcaption>{escape(role.role)}, {escape(role.format)}, {_decibels(role.sqnr)}</figcaption></figure>"
        for role in layer.roles
    )
    effect = f"{layer.alone - result.high:+.3g}"
    return (
        f"<details{' open' * shown}><summary>{escape(layer.name)} <span class='soft'>{escape(layer.op)}, {escape(layer.formats)}; "
        f'alone in FP8 {effect}</span></summary><div class="grid">{figures}</div></details>'
    )


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _table(result: Sensitivity) -> str:
    heads = ("SQNR dB", "underflow", "overflow", "amax", "loss, alone in FP8", "loss, all but it")
    head = "".join(f'<th class="left">{name}</th>' for name in ("layer", "role", "format")) + "".join(f"<th>{name}</th>" for name in heads)
    rows = []
    for layer in result.layers:
        losses = [f"{layer.alone:.6g}", "" if layer.without is None else f"{layer.without:.6g}"]
        for role in layer.roles:
            left = "".join(f'<td class="left">{escape(cell)}</td>' for cell in (layer.name, role.role, role.format))
            numbers = [
                _decibels(role.sqnr).removesuffix(" dB"),
                f"{role.underflow:.3%}",
                f"{role.overflow:.3%}",
                f"{role.amax:.4g}",
                *losses,
            ]
            rows.append(f"<tr>{left}{''.join(f'<td>{cell}</td>' for cell in numbers)}</tr>")
    return f'<h2>Every number</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _notes(result: Sensitivity) -> str:
    return "".join(f'<p class="soft">Note: {escape(note)}</p>' for note in result.notes)
