"""Spans: seconds spent in the named parts of a step. They take numbers, whoever measured them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spans:
    """Sums of seconds by name; for one thread."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` more under `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the wall time of the block under `name`, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """The sums since the last call, in the order the names came up; begins anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
