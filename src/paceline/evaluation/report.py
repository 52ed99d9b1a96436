"""report.html: one self-contained page about a run; tables and charts, nothing fetched, all text escaped."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from paceline.evaluation.charts import Points, line_chart
from paceline.version import VERSION

_MAX_POINTS = 400
"""Points drawn in a line: a long run is thinned by means over equal windows."""


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """What the target wrote after a held-out prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class DecodingRow:
    """One line of the decoding table."""

    name: str
    """For instance "eagle", "eagle, untrained", "prompt look-up"."""
    figures: Mapping[str, Any]
    """`DecodingResult.result()`, or the same read back from JSON."""
    trained: bool = False
    """Whether it stands for a draft of this run, after training: shown in the tiles and charts."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows; empty parts are left out."""

    title: str
    metrics: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl, each (step, kind) once, by step."""
    decoding: Sequence[DecodingRow] = ()
    samples: Sequence[SampleAnswer] = ()
    repeated_share: float | None = None
    """Of 4-grams in the target's answers, in [0, 1]."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part, in order."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the reader should know of the run: target, data, settings."""


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        written.write_text(render_report(report), encoding="utf-8")
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def render_report(report: Report) -> str:
    """The page as HTML; text from data, models and engines is escaped."""
    environment = Environment(
        loader=PackageLoader("paceline.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        title=report.title,
        subtitle=_subtitle(report),
        tiles=_tiles(report),
        rows=[{"name": row.name, "trained": row.trained, "cells": _cells(row.figures)} for row in report.decoding],
        charts=_charts(report),
        samples=report.samples,
        repeated="" if report.repeated_share is None else f"{report.repeated_share:.1%}",
        timings=[(name, f"{seconds:.1f}") for name, seconds in report.timings.items()],
        facts=list(report.facts.items()),
    )


def _subtitle(report: Report) -> str:
    steps = max((line["step"] for line in _lines(report, "train")), default=0)
    trained = f"{steps:,} optimizer steps, " if steps else ""
    return f"{trained}paceline {VERSION}"


def _tiles(report: Report) -> list[dict[str, str]]:
    tiles = [
        {
            "value": _number(row.figures.get("acceptance_length"), 2),
            "name": f"acceptance length of {row.name}",
            "note": f"{_number(row.figures.get('speedup'), 2)}x the target's speed alone; output "
            f"{row.figures.get('lossless', 'not checked')}",
        }
        for row in report.decoding
        if row.trained
    ]
    total = sum(report.timings.values())
    if total:
        tiles.append({"value": f"{total:.0f} s", "name": "in all", "note": f"{len(report.timings)} parts"})
    return tiles


def _cells(figures: Mapping[str, Any]) -> list[str]:
    ties = figures.get("ties", 0)
    return [
        _number(figures.get("acceptance_length"), 2),
        _number(figures.get("acceptance_length_all"), 2),
        _number(figures.get("acceptance_length_uncut"), 2),
        _number(figures.get("steps"), 0),
        _number(figures.get("tokens_per_s"), 1),
        _number(figures.get("plain_tokens_per_s"), 1),
        _number(figures.get("speedup"), 2),
        f"{figures.get('lossless', '-')}{f', {ties} ties' if ties else ''}",
    ]


def _charts(report: Report) -> list[dict[str, Any]]:
    train, held_out = _lines(report, "train"), _lines(report, "eval")
    loss = _series(train, "loss")
    lengths = _series(held_out, "acceptance_length")
    charts = [
        {"name": "Training loss", "svg": line_chart(loss, "step", "loss")},
        {"name": "Acceptance length on held-out rows", "svg": line_chart(lengths, "step", "tokens per forward")},
        {"name": "Loss per position", "svg": line_chart(_newest_per_position(train, "loss"), "position", "loss")},
    ]
    rates: dict[str, Points] = {
        row.name: [(k + 1.0, rate) for k, rate in enumerate(row.figures.get("rate") or [])] for row in report.decoding
    }
    if not rates and held_out:
        rates = {
            name: [(k + 1.0, rate) for k, rate in enumerate(figures.get("rate") or [])]
            for name, figures in held_out[-1]["drafts"].items()
        }
    svg = line_chart(rates, "position", "accepted, of steps that reached it", y_range=(0.0, 1.0))
    return [*charts, {"name": "Acceptance per position", "svg": svg}]


def _lines(report: Report, kind: str) -> list[Mapping[str, Any]]:
    return [line for line in report.metrics if line.get("kind") == kind and line.get("drafts")]


def _series(lines: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Points]:
    names = dict.fromkeys(name for line in lines for name in line["drafts"])
    series: dict[str, Points] = {}
    for name in names:
        points = [(float(line["step"]), line["drafts"][name].get(figure)) for line in lines if name in line["drafts"]]
        series[name] = _thinned(points)
    return series


def _newest_per_position(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Points]:
    """Means over the last tenth of the steps: a single step is noise."""
    last = lines[-max(1, len(lines) // 10) :]
    series: dict[str, Points] = {}
    for name in dict.fromkeys(name for line in last for name in line["drafts"]):
        vectors = [line["drafts"].get(name, {}).get("per_position", {}).get(metric) or [] for line in last]
        longest = max(map(len, vectors))
        series[name] = [
            (k + 1.0, _mean([vector[k] for vector in vectors if k < len(vector) and vector[k] is not None]))
            for k in range(longest)
        ]
    return series


def _thinned(points: Points) -> Points:
    window = -(-len(points) // _MAX_POINTS)
    if window <= 1:
        return points
    groups = [points[i : i + window] for i in range(0, len(points), window)]
    return [(group[-1][0], _mean([y for _, y in group if y is not None])) for group in groups]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
