"""Line charts as inline SVG: no library, no script, no network; every label is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float | None]]
_COLORS = ("#0b6e6e", "#d1495b", "#3d5a98", "#b5830a", "#6a4c93", "#4c7d3a")
_WIDTH, _HEIGHT = 560.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 14.0, 30.0, 44.0


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its label and range."""

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """About five round numbers inside the range."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    series: Mapping[str, Points], x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Markup:
    """An SVG element with one line a series and its legend, or a sentence where there is nothing to draw.

    Points without a value (None, or not finite) break no line; a series of few points shows them as dots.
    """
    kept = {name: [(x, y) for x, y in points if y is not None and math.isfinite(y)] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Markup('<p class="none">Nothing recorded yet.</p>')
    x = Axis(x_label, *_padded([px for points in kept.values() for px, _ in points], 0.0))
    y = Axis(y_label, *(y_range or _padded([py for points in kept.values() for _, py in points], 0.05)))
    body = [_grid(x, y)]
    for i, (name, points) in enumerate(kept.items()):
        body.append(_line(points, x, y, _COLORS[i % len(_COLORS)], name))
    drawing = Markup(
        '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{} over {}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(_WIDTH, _HEIGHT, y_label, x_label, Markup("").join(body))
    return drawing + _legend(list(kept))


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)


def _place(x: Axis, y: Axis, px: float, py: float) -> tuple[float, float]:
    across = (px - x.low) / (x.high - x.low)
    up = (min(max(py, y.low), y.high) - y.low) / (y.high - y.low)
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> Markup:
    parts = []
    for tick in y.ticks():
        _, at = _place(x, y, x.low, tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, at, at
            )
        )
        parts.append(_text(_LEFT - 8, at + 4, _number(tick), "end"))
    for tick in x.ticks():
        at, _ = _place(x, y, tick, y.low)
        parts.append(_text(at, _HEIGHT - _BOTTOM + 18, _number(tick), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x.label, "middle"))
    parts.append(_text(8, 14, y.label, "start"))
    return Markup("").join(parts)


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis, color: str, name: str) -> Markup:
    placed = [_place(x, y, px, py) for px, py in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
    parts = [Markup('<polyline points="{}" stroke="{}"><title>{}</title></polyline>').format(path, color, name)]
    if len(points) <= 40:
        for (px, py), (at_x, at_y) in zip(points, placed, strict=True):
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"><title>{}: {} at {}</title></circle>').format(
                    at_x, at_y, color, name, _number(py), _number(px)
                )
            )
    return Markup("").join(parts)


def _legend(names: Sequence[str]) -> Markup:
    """Below the drawing, as text that wraps."""
    items = [
        Markup('<span><i style="background:{}"></i>{}</span>').format(_COLORS[i % len(_COLORS)], name)
        for i, name in enumerate(names)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
