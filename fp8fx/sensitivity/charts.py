"""Pictures as inline SVG: bars per layer, and histograms of exponents with the format's range behind them. Colours are the page's (CSS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fp8fx.sensitivity.result import LayerResult, RoleResult, Sensitivity

ROW, NAME, BAR, GAP, NUMBER = 22, 250, 250, 34, 76  # pixels of the bar chart: a row's height, and columns
LOW_DB = 20.0  # below it a bar is in the colour of a warning
WIDE, HIGH = 248, 84  # of one histogram


def layer_bars(result: Sensitivity) -> str:
    """One row per layer, in execution order.

    On the left the SQNR of its worst forward role (bar) and gradient role (mark); on the right what it adds to the loss in high precision
    (bar), and what the loss in FP8 falls by without it (mark).
    """
    layers = result.layers
    effects = _Axis([e for layer in layers for e in (result.effect(layer), result.gain(layer)) if e is not None])
    top = max([40.0, *(layer.sqnr for layer in layers if math.isfinite(layer.sqnr))]) * 1.02
    height, width = ROW * (len(layers) + 1) + 8, NAME + 2 * (BAR + NUMBER) + GAP
    second = NAME + BAR + NUMBER + GAP
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="SQNR and loss effect per layer">',
        _text(NAME, 14, "SQNR, dB", "head"),
        _text(second, 14, "change of the loss, this layer alone in FP8", "head"),
    ]
    for number, layer in enumerate(layers):
        y = ROW * (number + 1) + 4
        parts += ["<g>", f"<title>{escape(_tooltip(result, layer))}</title>", _text(NAME - 8, y + 14, _short(layer.name), "name")]
        parts += _sqnr_bar(layer, y, top)
        parts += _effect_bar(result, layer, second, y, effects)
        parts.append("</g>")
    zero = second + effects.place(0.0)
    parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{ROW}" y2="{height}"/></svg>')
    return "".join(parts)


class _Axis:
    """Places of losses on a bar of BAR pixels; zero is always there."""

    def __init__(self, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        self.low, self.high = min([0.0, *finite]), max([0.0, *finite])

    def place(self, value: float) -> float:
        if not math.isfinite(value):
            return float(BAR)
        span = self.high - self.low
        return BAR * (value - self.low) / span if span else 0.0


def _sqnr_bar(layer: LayerResult, y: int, top: float) -> list[str]:
    value, gradient = layer.sqnr, layer.gradient_sqnr
    said = "exact" if value == math.inf else "" if math.isnan(value) else f"{value:.1f}"
    parts = [_bar(NAME, y, _length(value, top), "low" if value < LOW_DB else "sqnr"), _text(NAME + BAR + 5, y + 14, said, "number")]
    return parts if math.isnan(gradient) else [*parts, _mark(NAME + _length(gradient, top), y)]


def _length(decibels: float, top: float) -> float:
    return 0.0 if math.isnan(decibels) else BAR * min(max(decibels / top, 0.0), 1.0)


def _effect_bar(result: Sensitivity, layer: LayerResult, left: float, y: int, axis: _Axis) -> list[str]:
    value, gain = result.effect(layer), result.gain(layer)
    zero, end = axis.place(0.0), axis.place(value)
    said = f"{value:+.2g}" if math.isfinite(value) else "not finite"
    parts = [
        _bar(left + min(zero, end), y, abs(end - zero), "worse" if value > 0 else "better"),
        _text(left + BAR + 5, y + 14, said, "number"),
    ]
    return parts if gain is None or not math.isfinite(gain) else [*parts, _mark(left + axis.place(gain), y)]


def _mark(x: float, y: int) -> str:
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + ROW - 3}"/>'


def _tooltip(result: Sensitivity, layer: LayerResult) -> str:
    gain = result.gain(layer)
    decibels = f"SQNR {layer.sqnr:.1f} dB, of gradients {layer.gradient_sqnr:.1f} dB"
    last = "" if gain is None else f"; exempting it alone lowers the loss by {gain:.4g}"
    return f"{layer.name} ({layer.op}): {decibels}; alone in FP8 {layer.alone - result.high:+.4g}{last}"


def _short(name: str) -> str:
    """The end of a long name says more than its beginning."""
    return name if len(name) <= 36 else f"…{name[-35:]}"


def _bar(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y + 3}" width="{max(width, 0.5):.1f}" height="{ROW - 8}" rx="2"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text)}</text>'


def histogram(role: RoleResult) -> str:
    """Elements by exponent after scaling; the normal range of the format shaded, its subnormals lighter."""
    smallest, normal, largest = role.range
    low = min([smallest - 2, *role.exponents])
    high = max([largest + 2, *role.exponents])
    step = WIDE / (high - low + 1)
    most = max(role.exponents.values(), default=1)
    floor = HIGH - 16
    parts = [
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img" aria-label="exponents of {escape(role.role)}">',
        f'<rect class="subnormal" x="{(smallest - low) * step:.1f}" y="0" width="{(normal - smallest) * step:.1f}" height="{floor}"/>',
        f'<rect class="normal" x="{(normal - low) * step:.1f}" y="0" width="{(largest - normal + 1) * step:.1f}" height="{floor}"/>',
    ]
    for exponent, count in role.exponents.items():
        tall = (floor - 4) * count / most
        kind = "count" if smallest <= exponent <= largest else "lost"
        x = (exponent - low) * step
        box = f'x="{x + 0.5:.1f}" y="{floor - max(tall, 1):.1f}" width="{max(step - 1, 1):.1f}" height="{max(tall, 1):.1f}"'
        parts.append(f'<rect class="{kind}" {box}><title>2^{exponent}: {count} elements</title></rect>')
    for exponent in (smallest, normal, largest):
        middle = (exponent - low + 0.5) * step
        parts.append(f'<text class="tick" x="{middle:.1f}" y="{HIGH - 4}">{exponent}</text>')
    return "".join([*parts, "</svg>"])
