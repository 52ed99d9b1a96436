"""Connections are closed on threads of their own: a server that does not answer holds up nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from paceline.client.connection import Connection
from paceline.errors import PacelineError

_PATIENCE_S = 2.0
_logger = logging.getLogger(__name__)


class Closing:
    """Closes connections, one short-lived thread each.

    consumes: connections      waits for: their `close`      unblocked by: each connection's own time-outs
    """

    def __init__(self, on_bug: Callable[[BaseException], None]) -> None:
        """`on_bug` gets what is raised besides PacelineErrors."""
        self._on_bug = on_bug
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def close(self, name: str, connection: Connection, *, abort: bool = False) -> None:
        """Close `connection`, without waiting; `abort` first fails what is outstanding there."""
        thread = threading.Thread(target=self._close, args=(name, connection, abort), name=f"close {name}", daemon=True)
        with self._lock:
            self._threads = {other for other in self._threads if other.is_alive()} | {thread}
            thread.start()

    def wait(self, besides: Iterable[threading.Thread] = ()) -> None:
        """Wait for the threads, and those named, for two seconds in all; a WARNING names those that are not done."""
        with self._lock:
            threads = [*self._threads, *besides]
        until = time.monotonic() + _PATIENCE_S
        current = threading.current_thread()
        for thread in threads:
            if thread is not current:
                thread.join(max(0.0, until - time.monotonic()))
        late = [thread.name for thread in threads if thread is not current and thread.is_alive()]
        if late:
            _logger.warning("not done after %.0f s, left to end by itself: %s", _PATIENCE_S, ", ".join(late))

    def _close(self, name: str, connection: Connection, abort: bool) -> None:
        try:
            try:
                if abort:
                    connection.abort()
            finally:
                connection.close()
        except PacelineError as error:
            _logger.warning("%s: the session was not closed in order: %s", name, error)
        except BaseException as error:
            self._on_bug(error)
