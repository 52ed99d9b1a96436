"""Progress through a known number of rows: a bar on a terminal, elsewhere a log line now and then."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LOG_EVERY_S = 30.0
logger = logging.getLogger(__name__)


class RowProgress:
    """Rows done, bytes, bytes a second and the time left."""

    def __init__(self, what: str, num_rows: int, num_done: int, console: Console) -> None:
        """Begin at `num_done` of `num_rows`; `what` opens every line, e.g. "recorded"."""
        self._what = what
        self._num_rows = num_rows
        self._num_before = self._num_done = num_done
        self._num_bytes = 0
        self._begin = time.monotonic()
        self._next_log = self._begin + _LOG_EVERY_S
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}", markup=False))
            self._bar = Progress(TextColumn(what, markup=False), *columns, console=console)
            self._task = self._bar.add_task("", total=num_rows, completed=num_done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, num_bytes: int) -> None:
        """One row more, of `num_bytes`."""
        self._num_done += 1
        self._num_bytes += num_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._num_done, description=self.text(now))
        elif now >= self._next_log:
            logger.info("%s %d of %d rows | %s", self._what, self._num_done, self._num_rows, self.text(now))
            self._next_log = now + _LOG_EVERY_S

    def text(self, now: float) -> str:
        """For instance "12.30 GiB | 310 MiB/s | 0:12:01 left"."""
        seconds = max(now - self._begin, 1e-6)
        num_new = max(self._num_done - self._num_before, 1)
        left = timedelta(seconds=round(seconds / num_new * (self._num_rows - self._num_done)))
        return f"{self._num_bytes / 2**30:.2f} GiB | {self._num_bytes / 2**20 / seconds:,.0f} MiB/s | {left} left"
