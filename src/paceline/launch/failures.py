"""Why a process of a run failed: written down by itself, read by whoever has to say which failure came first."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paceline.config.files import write_whole
from paceline.errors import PacelineError, StoppedError, print_error

_LOST_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
)
"""In errors of gloo, which have no class of their own."""
_TIMED_OUT = ("Timed out waiting", "Application timeout", "Wait timeout", "timed out after")
"""In errors of gloo, of stores and of NCCL."""

_AFTER_ANOTHER_S = 2.0
"""A rank that lost another one ends so much later: torchrun and Slurm name those that ended first."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that ended a process."""

    time: float
    """Of time.time()."""
    message: str
    """What to tell the user: an error's message, or the traceback of one that nobody expected."""
    notes: tuple[str, ...]
    """Of the error; they come before its message."""
    follows: bool
    """Whether it only says that another process is gone, or that an end was asked for."""

    @property
    def waited_in_vain(self) -> bool:
        """Whether it is that another process did not come in time."""
        return self.follows and any(text in self.message for text in _TIMED_OUT)

    @property
    def text(self) -> str:
        return "\n".join((*self.notes, self.message))

    @property
    def summary(self) -> str:
        """One line."""
        lines = self.message.strip().splitlines() or [""]
        return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def describe_failure(error: BaseException) -> Failure:
    """A failure of now."""
    if isinstance(error, PacelineError):
        message, notes = str(error), tuple(map(str, getattr(error, "__notes__", ())))
    else:
        message, notes = "".join(traceback.format_exception(error)).rstrip(), ()
    return Failure(time.time(), message, notes, follows=_follows_from_another(error))


def read_failure(path: Path) -> Failure | None:
    """What a process wrote before it ended; None if it could not."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return Failure(**(table | {"notes": tuple(table["notes"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextlib.contextmanager
def failures_reported(path: Path | None) -> Iterator[None]:
    """An error in this block ends a trainer rank at once, exit code 1, after it was written to `path`.

    Without a path (under torchrun or Slurm) it is printed, and left where torchrun looks for it. The interpreter's own
    end is skipped: it would wait for process groups, and those for ranks that never come.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the rank ends with it, and the others must be told why
        failure = describe_failure(error)
        if path is None:
            _print(error)
            if failure.follows:
                time.sleep(_AFTER_ANOTHER_S)
            else:
                _tell_torchrun(error)
        elif not _written(path, failure):
            _print(error)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a closed pipe
                stream.flush()
        os._exit(1)


def _written(path: Path, failure: Failure) -> bool:
    try:
        write_whole(path, json.dumps(asdict(failure)))
    except OSError:  # the parent is gone, and its private directory with it
        return False
    return True


def _print(error: Exception) -> None:
    if isinstance(error, PacelineError):
        print_error(error)
    else:
        traceback.print_exception(error)


def _tell_torchrun(error: Exception) -> None:
    """torchrun names the rank that failed first by what each left in the file of this variable."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _follows_from_another(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is that a peer is gone."""
    while error is not None:
        if isinstance(error, StoppedError) or any(base.__name__ == "DistError" for base in type(error).__mro__):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
