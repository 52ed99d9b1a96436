"""Whether a server that somebody else runs is still there."""

from __future__ import annotations

import threading
from collections.abc import Callable

from paceline.errors import ServerLostError

_EVERY_S = 2.0
_NUM_MISSED = 3
"""So many looks in a row without an answer are an end, not a pause."""


class Heartbeat:
    """Looks every 2 s, and tells once when the server is gone.

    consumes: nothing      waits for: the next look
    unblocked by: close()
    """

    def __init__(self, name: str, is_alive: Callable[[], bool], on_end: Callable[[Exception], None]) -> None:
        self._name, self._is_alive, self._on_end = name, is_alive, on_end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="engine-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more. Safe to call twice."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        missed = 0
        while missed < _NUM_MISSED:
            if self._stop.wait(_EVERY_S):
                return
            missed = 0 if self._is_alive() else missed + 1
        self._on_end(ServerLostError(f"{self._name} does not answer any more"))
