"""metrics.jsonl: what is written is read, after any crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.errors import DataError
from paceline.observe.metrics import Line, MetricsWriter, read_metrics
from paceline.observe.spans import Spans


class Recorder:
    """A view that remembers what happened."""

    def __init__(self) -> None:
        self.events: list[Line | str] = []

    def write(self, line: Line) -> None:
        self.events.append(line)

    def flush(self) -> None:
        self.events.append("flush")

    def close(self) -> None:
        self.events.append("close")


def test_the_last_line_of_each_step_and_kind_is_kept_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for attempt, steps in ((1, (1, 2, 3)), (2, (2,))):
        writer = MetricsWriter(path)
        assert writer.attempt == attempt
        for step in steps:
            writer.write("train", step, loss=10.0 * attempt + step)
        writer.write("eval", 2, loss=float(attempt))
        writer.close()
    lines = read_metrics(path)
    assert [(line["step"], line["kind"], line["attempt"]) for line in lines] == [
        (1, "train", 1),
        (2, "train", 2),
        (2, "eval", 2),
        (3, "train", 1),
    ]
    assert len(path.read_text().splitlines()) == 6, "append-only"


def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write("train", 1, loss=1.0)
    writer.write("train", 2, loss=2.0)
    writer.close()
    path.write_bytes(path.read_bytes()[:-9])
    assert [line["step"] for line in read_metrics(path)] == [1]
    writer = MetricsWriter(path)
    writer.write("train", 2, loss=3.0)
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 3.0)]


@pytest.mark.parametrize("damage", ["{not json}", '{"kind": "train"}', "17"])
def test_damage_before_the_last_line_is_an_error_with_its_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"kind": "train", "step": 1, "attempt": 1})
    path.write_text(f"{good}\n{damage}\n{good}\n")
    for read in (read_metrics, MetricsWriter):
        with pytest.raises(DataError, match="line 2"):
            read(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: No such file"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("eval", 1, drafts={"a": {"loss": float("nan"), "rates": [0.5, float("inf")]}})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["drafts"] == {"a": {"loss": None, "rates": [0.5, None]}}


def test_flushed_lines_survive_a_kill_and_views_get_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorder = Recorder()
    writer = MetricsWriter(path, [recorder])
    writer.write("train", 1, loss=1.0)
    writer.flush()
    assert [line["step"] for line in read_metrics(path)] == [1], "readable while the writer lives"
    writer.close()
    assert recorder.events == [read_metrics(path)[0], "flush", "flush", "close"]


def test_spans_add_up_what_they_are_given_and_begin_anew() -> None:
    spans = Spans()
    spans.add("forward", 0.25)
    spans.add("forward", 0.5)
    with pytest.raises(ZeroDivisionError), spans.timed("failing"):
        _ = 1 / 0
    taken = spans.take()
    assert taken["forward"] == 0.75
    assert 0 <= taken["failing"] < 1
    assert spans.take() == {}


def test_observing_needs_no_torch() -> None:
    code = (
        "import sys; from paceline.observe import logs, metrics, progress, spans, trackers;"
        "print([name for name in ('torch', 'wandb', 'tensorboard') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
