"""One thread that calls what is due: rows to ask for later, looks at what is out."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Clock:
    """Calls functions at their time, one after the other, on one thread.

    consumes: what `call_at` was given      waits for: the earliest of them
    unblocked by: an earlier one, close()
    """

    def __init__(self, name: str, on_bug: Callable[[BaseException], None]) -> None:
        """`on_bug` gets whatever a call raises, once; the clock has stopped then."""
        self._on_bug = on_bug
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call_at(self, when: float, call: Callable[[], None]) -> None:
        """Call `call` when `time.monotonic()` is `when`; nothing after `close`."""
        with self._changed:
            if not self._closed:
                heapq.heappush(self._due, (when, next(self._order), call))
                self._changed.notify_all()

    def close(self) -> list[threading.Thread]:
        """Call nothing any more; its thread, which ends when the call that runs now is done. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()
        return [self._thread]

    def _run(self) -> None:
        try:
            while (call := self._next_due()) is not None:
                call()
        except BaseException as error:
            self._on_bug(error)

    def _next_due(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait_s)
        return None
