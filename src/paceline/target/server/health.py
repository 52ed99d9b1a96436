"""Whether a server takes rows: serving, stopping, or its engine is dead."""

from __future__ import annotations

import logging
import threading
from typing import Literal

from paceline.errors import EngineLostError, OutOfMemoryError, PacelineError, StoppedError
from paceline.target.server.answers import Refusal

logger = logging.getLogger(__name__)

_DEVICE_LOST = ("CUDA error", "CUDA driver error", "NCCL error", "device-side assert")
"""In an error's message: the process's CUDA context can compute nothing more."""


class Health:
    """One server's state; any thread may look and tell."""

    def __init__(self) -> None:
        self._failure: BaseException | None = None
        self._stopping = False
        self.changed = threading.Event()
        """Set once the engine is dead: the process should end."""

    @property
    def failure(self) -> BaseException | None:
        """What the engine died of."""
        return self._failure

    def stop(self) -> None:
        """No more rows from now on."""
        self._stopping = True

    def row_failed(self, error: BaseException) -> None:
        """A row failed with `error`: perhaps the engine has, too."""
        if not self._stopping and _is_the_engines_end(error):
            self.engine_died(error)

    def engine_died(self, error: BaseException) -> None:
        """The engine computes no more rows. The first reason counts."""
        if self._stopping or self._failure is not None:
            return
        self._failure = error
        logger.critical("the target engine is dead: %s: %s", type(error).__name__, error)
        self.changed.set()

    def status(self) -> Literal["ok", "stopping", "failed"]:
        """For /healthz."""
        if self._failure is not None:
            return "failed"
        return "stopping" if self._stopping else "ok"

    def check_serving(self) -> None:
        """Raise Refusal when no more rows are taken."""
        if self._failure is not None:
            raise Refusal("engine", f"the target engine is dead: {self._failure}")
        if self._stopping:
            raise Refusal("stopping", "this server is stopping: ask another")


def _is_the_engines_end(error: BaseException) -> bool:
    """An engine fails a row with TargetError and goes on; anything that is no answer of its own is its end."""
    if isinstance(error, EngineLostError | StoppedError) or not isinstance(error, PacelineError):
        return True
    if isinstance(error, OutOfMemoryError):
        return False
    while error is not None:
        if any(words in str(error) for words in _DEVICE_LOST):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return False
