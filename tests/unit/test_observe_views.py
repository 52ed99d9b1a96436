"""Views of metrics: progress, logs, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paceline.config.run_dir import RunDir
from paceline.config.training import TrackingConfig
from paceline.errors import ConfigError
from paceline.observe.logs import logging_for
from paceline.observe.metrics import Line, MetricsWriter
from paceline.observe.progress import Summary, build_progress
from paceline.observe.trackers import build_trackers, scalars

TRAIN: dict[str, Any] = {
    "tokens_per_s": 12345.6,
    "seconds": {"step": 0.5, "forward": 0.25},
    "drafts": {"eagle": {"loss": 2.31062, "per_position": {"accuracy": [0.5, None]}}},
}
EVAL: dict[str, Any] = {"drafts": {"eagle": {"acceptance_length": 2.407}}}


def line(kind: str, step: int, values: dict[str, Any]) -> Line:
    return {"kind": kind, "step": step, "attempt": 1, "time": 0.0, **values}


def test_the_summary_tells_step_loss_speed_acceptance_and_time_left() -> None:
    summary = Summary(num_steps=1000)
    summary.write(line("train", 100, TRAIN))
    assert summary.text() == "loss eagle 2.3106 | 12,346 tokens/s | 0:07:30 left"
    summary.write(line("eval", 100, EVAL))
    assert summary.text() == "loss eagle 2.3106 | acceptance eagle 2.41 | 12,346 tokens/s | 0:07:30 left"


def test_a_step_without_weight_has_no_loss_to_show() -> None:
    summary = Summary(num_steps=10)
    summary.write(line("train", 1, TRAIN | {"drafts": {"eagle": {"loss": None}}}))
    assert "loss eagle -" in summary.text()


def test_off_a_terminal_progress_is_one_log_line_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    progress = build_progress(1000, Console(file=output))
    for step in (99, 100):
        progress.write(line("train", step, TRAIN))
    progress.flush()
    progress.flush()
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 100/1000 | loss eagle 2.3106 | 12,346 tokens/s | 0:07:30 left"
    ]
    assert output.getvalue() == ""


def test_on_a_terminal_progress_is_a_bar_and_log_lines_appear_above_it() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140, color_system=None)
    progress = build_progress(1000, console)
    with logging_for("trainer", 0, console=console):
        logging.getLogger("paceline.test").info("checkpoint written")
        progress.write(line("train", 100, TRAIN))
        progress.flush()
    progress.close()
    shown = output.getvalue()
    assert "checkpoint written" in shown
    assert "100/1000" in shown
    assert "loss eagle 2.3106" in shown


def test_every_log_line_says_role_and_rank(tmp_path: Path) -> None:
    run, output = RunDir(tmp_path), io.StringIO()
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with logging_for("trainer", 3, run.log("trainer", 3), Console(file=output, width=20)):
        logging.getLogger("paceline.test").warning("rows of %s\ntwo lines, longer than the console is wide", "a b c")
        logging.getLogger("paceline.test").debug("too fine")
        loud = logging.getLogger("paceline.test.loud")
        loud.setLevel(logging.DEBUG)
        loud.debug("a library's logger with a level of its own")
    loud.setLevel(logging.NOTSET)
    logging.getLogger("paceline.test").warning("afterwards")
    assert (root.level, list(root.handlers)) == before
    (written,) = (tmp_path / "logs/trainer-3.log").read_text().splitlines()
    (shown,) = output.getvalue().splitlines()
    for text in (written, shown):
        assert "WARNING trainer-3" in text
        assert text.endswith("rows of a b c\\ntwo lines, longer than the console is wide")


def test_a_traceback_reaches_the_log_file(tmp_path: Path) -> None:
    with logging_for("trainer", 0, tmp_path / "log"):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            logging.getLogger("paceline.test").exception("the step failed")
    assert "ZeroDivisionError: division by zero" in (tmp_path / "log").read_text()


def test_numbers_of_a_line_are_named_by_their_path() -> None:
    assert dict(scalars(line("train", 7, TRAIN))) == {
        "train/attempt": 1.0,
        "train/tokens_per_s": 12345.6,
        "train/seconds/step": 0.5,
        "train/seconds/forward": 0.25,
        "train/drafts/eagle/loss": 2.31062,
        "train/drafts/eagle/per_position/accuracy/0": 0.5,
    }


def test_no_tracker_is_built_unless_asked_for(tmp_path: Path) -> None:
    assert build_trackers(TrackingConfig(), RunDir(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'aim' is not installed"):
        build_trackers(TrackingConfig(trackers=("aim",)), RunDir(tmp_path))


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path)
    writer = MetricsWriter(run.metrics, build_trackers(TrackingConfig(tensorboard=True), run))
    for step in (1, 2):
        writer.write("train", step, **TRAIN)
    writer.write("eval", 2, **EVAL)
    writer.close()
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    losses = events.Scalars("train/drafts/eagle/loss")
    assert [(event.step, round(event.value, 5)) for event in losses] == [(1, 2.31062), (2, 2.31062)]
    assert events.Scalars("eval/drafts/eagle/acceptance_length")[0].value == pytest.approx(2.407)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'pip install "paceline\[wandb\]"'):
        build_trackers(TrackingConfig(wandb=True), RunDir(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_writes_into_the_run_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    writer = MetricsWriter(run.metrics, build_trackers(TrackingConfig(wandb=True, wandb_mode="offline"), run))
    writer.write("train", 1, **TRAIN)
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
