"""metrics.jsonl: the truth about a run, written append-only; everything else is a view of it.

A line is one JSON object with at least `kind` ("train", "eval"), `step` (optimizer steps done), `attempt` (starts of
this run, from 1) and `time` (seconds since 1970). Numbers that are not finite are written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from paceline.errors import DataError

Line = dict[str, Any]


class View(Protocol):
    """Something that shows metrics elsewhere: a progress bar, TensorBoard, Weights & Biases."""

    def write(self, line: Line) -> None:
        """Take one line."""

    def flush(self) -> None:
        """A logging interval is complete: show what came."""

    def close(self) -> None:
        """No line follows."""


class MetricsWriter:
    """Appends lines to metrics.jsonl and hands each to the views.

    Opening an existing file cuts off a last line torn by a crash and counts one attempt more than the file holds.

    Raises:
        DataError: the existing file is damaged before its last line.
    """

    def __init__(self, path: Path, views: Iterable[View] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, num_bytes = _read_lines(path) if path.exists() else ([], 0)
        self.attempt: int = 1 + max((int(line["attempt"]) for line in lines), default=0)
        self._views = tuple(views)
        self._file = path.open("ab")
        self._file.truncate(num_bytes)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line; it is on its way to the disk after `flush`."""
        line = _plain({"kind": kind, "step": step, "attempt": self.attempt, "time": time.time(), **values})
        self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        for view in self._views:
            view.write(line)

    def flush(self, durable: bool = False) -> None:
        """Hand all lines to the operating system; `durable` waits until the disk has them."""
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())
        for view in self._views:
            view.flush()

    def close(self) -> None:
        """Flush, and close the views with the file."""
        self.flush(durable=True)
        self._file.close()
        for view in self._views:
            view.close()


class SilentMetrics(MetricsWriter):
    """Writes nothing: that of every rank but the first."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Drop the line."""

    def flush(self, durable: bool = False) -> None:
        """There is nothing to flush."""

    def close(self) -> None:
        """There is nothing to close."""


def read_metrics(path: Path) -> list[Line]:
    """The last line written for each (step, kind), ordered by step; a torn last line is ignored.

    Raises:
        DataError: the file is missing, or damaged before its last line.
    """
    last = {(line["step"], line["kind"]): line for line in _read_lines(path)[0]}
    return sorted(last.values(), key=lambda line: int(line["step"]))


def _read_lines(path: Path) -> tuple[list[Line], int]:
    """All whole lines, and the bytes they take."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    num_bytes = content.rfind(b"\n") + 1
    lines = []
    for number, text in enumerate(content[:num_bytes].splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
        if not isinstance(line, dict) or not {"kind", "step", "attempt"} <= line.keys():
            raise DataError(f"{path}, line {number}: no line of metrics (kind, step and attempt are missing)")
        lines.append(line)
    return lines, num_bytes


def _plain(value: Any) -> Any:
    """`value` as JSON takes it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
