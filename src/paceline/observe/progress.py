"""Progress of training as a view of metrics: a bar on a terminal, elsewhere a log line each logging interval."""

from __future__ import annotations

import logging
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from paceline.observe.metrics import Line, View

logger = logging.getLogger(__name__)


def build_progress(num_steps: int, console: Console) -> View:
    """A bar on a terminal, a line in the log each interval anywhere else; `num_steps` is where training ends."""
    return ProgressBar(num_steps, console) if console.is_terminal else ProgressLines(num_steps)


class Summary:
    """The newest figures of a run in one line: step, losses, tokens/s, acceptance lengths, time left."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = 0
        self._losses: dict[str, float | None] = {}
        self._acceptance_lengths: dict[str, float | None] = {}
        self._tokens_per_s = 0.0
        self._step_s = 0.0

    def write(self, line: Line) -> None:
        """Take a line of metrics."""
        self.step = int(line["step"])
        if line["kind"] == "train":
            self._losses = {name: figures["loss"] for name, figures in line["drafts"].items()}
            self._tokens_per_s = line["tokens_per_s"] or 0.0
            self._step_s = line["seconds"]["step"]
        elif line["kind"] == "eval":
            self._acceptance_lengths = {
                name: figures.get("acceptance_length") for name, figures in line["drafts"].items()
            }

    def text(self) -> str:
        """For instance "loss eagle 2.3104 | acceptance eagle 2.41 | 12,345 tokens/s | 0:12:01 left"."""
        left = timedelta(seconds=round(self._step_s * max(0, self.num_steps - self.step)))
        parts = [
            "loss " + "  ".join(f"{name} {_number(loss, 4)}" for name, loss in self._losses.items()),
            "acceptance " + "  ".join(f"{name} {_number(value, 2)}" for name, value in self._acceptance_lengths.items())
            if self._acceptance_lengths
            else "",
            f"{self._tokens_per_s:,.0f} tokens/s",
            f"{left} left",
        ]
        return " | ".join(part for part in parts if part)


class ProgressBar:
    """A rich progress bar; `console` is shared with logging, whose lines appear above the bar."""

    def __init__(self, num_steps: int, console: Console) -> None:
        self._summary = Summary(num_steps)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.description}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task("", total=num_steps)
        self._progress.start()

    def write(self, line: Line) -> None:
        self._summary.write(line)

    def flush(self) -> None:
        self._progress.update(self._task, completed=self._summary.step, description=self._summary.text())

    def close(self) -> None:
        self._progress.stop()


class ProgressLines:
    """One log line for each interval in which a step was trained or an evaluation made."""

    def __init__(self, num_steps: int) -> None:
        self._summary = Summary(num_steps)
        self._changed = False

    def write(self, line: Line) -> None:
        self._summary.write(line)
        self._changed = True

    def flush(self) -> None:
        if self._changed:
            logger.info("step %d/%d | %s", self._summary.step, self._summary.num_steps, self._summary.text())
        self._changed = False

    def close(self) -> None:
        self.flush()


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
