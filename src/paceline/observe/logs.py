"""Logging of one process: everything to its file, and to the console through rich; each line says role and rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler


@contextmanager
def logging_for(
    role: str, rank: int, file: Path | None = None, console: Console | None = None, level: int = logging.INFO
) -> Iterator[None]:
    """Send this process's log records to `file` (appended) and `console` until the block ends.

    Args:
        role: what the process is, e.g. "trainer"; with `rank` it opens every line.
        file: usually `RunDir.log(role, rank)`.
        console: shared with a progress display, so that lines appear above it; None writes nothing to a console.
        level: least severe level that is kept.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = []
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(_OneLineFormatter(f"%(asctime)s %(levelname)s {role}-{rank} %(name)s: %(message)s"))
    if console is not None:
        handlers.append(_console_handler(role, rank, console))
    level_before = root.level
    for handler in handlers:
        # On the handler too: a library's logger with a level of its own (torch's checkpoints) passes by the root's.
        handler.setLevel(level)
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level_before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _console_handler(role: str, rank: int, console: Console) -> logging.Handler:
    """Rich on a terminal; plain lines elsewhere, where rich would fold them at 80 columns."""
    if not console.is_terminal:
        plain = logging.StreamHandler(console.file if console.file is not None else sys.stderr)
        plain.setFormatter(_OneLineFormatter(f"%(asctime)s %(levelname)s {role}-{rank} %(message)s"))
        return plain
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=True)
    handler.setFormatter(logging.Formatter(f"{role}-{rank} %(message)s"))
    return handler


class _OneLineFormatter(logging.Formatter):
    """One event a line: line breaks inside a message are written as \\n; tracebacks keep theirs."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")
