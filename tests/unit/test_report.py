"""report.html: everything is there, nothing is fetched, nothing from data or models is markup."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paceline.evaluation.charts import Axis, line_chart
from paceline.evaluation.report import DecodingRow, Report, SampleAnswer, render_report, write_report
from paceline.evaluation.walk import Step, WalkSums

EVIL = "<script>alert('x')</script> & <img src=http://x onerror=y> \"quoted\""


def metrics(num_steps: int = 40, names: tuple[str, ...] = ("eagle", "dflash")) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        losses = {name: 6 * math.exp(-step / 15) + 2 + i for i, name in enumerate(names)}
        drafts = {
            name: {"loss": loss, "per_position": {"loss": [loss + 0.2 * k for k in range(4)]}}
            for name, loss in losses.items()
        }
        lines.append({"kind": "train", "step": step, "attempt": 1, "drafts": drafts})
        if step % 10 == 0:
            figures = {name: {"acceptance_length": 1 + step / 20, "rate": [0.6, 0.5, None]} for name in names}
            lines.append({"kind": "eval", "step": step, "attempt": 1, "drafts": figures})
    return lines


def decoding_figures(accepted: int) -> dict[str, Any]:
    sums = WalkSums(4)
    sums.add_steps([Step(i, accepted, 50 - i, True) for i in range(10)])
    speeds = {"tokens_per_s": 123.4, "plain_tokens_per_s": 61.7, "speedup": 2.0, "lossless": "exact", "ties": 0}
    return sums.result() | speeds


def full_report(text: str = "hello", name: str = "eagle") -> Report:
    return Report(
        title=text,
        metrics=metrics(names=(name, "dflash")),
        decoding=[
            DecodingRow(f"{name}, untrained", decoding_figures(0)),
            DecodingRow(name, decoding_figures(3), trained=True),
            DecodingRow("prompt look-up", decoding_figures(1)),
        ],
        samples=[SampleAnswer(text, text)],
        repeated_share=0.123,
        timings={text: 12.0, "train": 100.0},
        facts={text: text},
    )


class _Tags(HTMLParser):
    """Collects tags and attributes as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_the_page_shows_figures_charts_answers_and_times() -> None:
    page = render_report(full_report())
    tags = _Tags(page).tags
    assert tags.count("svg") == 4
    assert tags.count("polyline") == 2 + 2 + 2 + 3  # loss, acceptance length, loss and acceptance per position
    for text in ("4.00", "2.00x", "exact", "12.3%", "prompt look-up", "40 optimizer steps", "112 s"):
        assert text in page, text


def test_text_from_data_models_and_engines_is_never_markup() -> None:
    tags = _Tags(render_report(full_report(EVIL, name=EVIL)))
    plain = _Tags(render_report(full_report()))
    assert tags.tags == plain.tags
    assert "script" not in tags.tags
    assert "img" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    page = render_report(full_report())
    addresses = set(re.findall(r"https?://[^\"' ]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    attributes = {name for name, _ in _Tags(page).attributes}
    assert not attributes & {"src", "href"}
    assert "default-src 'none'" in page


def test_a_run_with_nothing_recorded_still_has_a_page(tmp_path: Path) -> None:
    write_report(Report(title="empty"), tmp_path / "run" / "report.html")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("Nothing recorded yet.") == 4
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]


def test_figures_that_do_not_exist_are_dashes() -> None:
    figures = WalkSums(4).result() | {"lossless": "within ties", "ties": 3}
    page = render_report(Report(title="t", decoding=[DecodingRow("d", figures, trained=True)]))
    assert "<td>-</td>" in page
    assert "within ties, 3 ties" in page


def test_a_long_run_is_drawn_with_few_points_and_its_last_step() -> None:
    page = render_report(Report(title="t", metrics=metrics(5000, names=("eagle",))))
    points = max(re.findall(r'points="([^"]*)"', page), key=len).split()
    assert 300 < len(points) <= 400
    assert float(points[-1].split(",")[0]) == pytest.approx(560 - 14)


def test_a_chart_skips_values_that_are_missing_or_not_finite() -> None:
    chart = line_chart({"a": [(0, 1.0), (1, None), (2, math.nan), (3, 2.0)]}, "x", "y")
    assert chart.count("<circle") == 2
    assert "nan" not in chart


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 8.0), (0.0, 12345.0), (2.03, 2.07), (-3.0, 4.0)])
def test_ticks_are_a_few_round_numbers_inside_the_axis(low: float, high: float) -> None:
    ticks = Axis("x", low, high).ticks()
    assert 3 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9
