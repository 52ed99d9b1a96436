"""Figures of a server for Prometheus: rows, bytes, queue, sessions, and how busy the engine is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_WINDOW_S = 60.0
_RECENT_ROWS = 32


class ServerMetrics:
    """Counts of one server, in a registry of its own; any thread may add."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self._rows = counter(
            "paceline_rows", "Requests for rows and parts that are over, by what became of them", "outcome"
        )
        self._computed = counter("paceline_computed_rows", "Rows that the engine computed")
        self._computed_tokens = counter("paceline_computed_tokens", "Tokens of these rows")
        self._parts = counter("paceline_row_parts", "Parts of rows that were sent, each to a rank of a group")
        self._tokens = counter("paceline_row_tokens", "Tokens of rows and parts that were sent")
        self._bytes = counter("paceline_sent_bytes", "Bytes of replies in HTTP bodies")
        self._requests = counter("paceline_http_requests", "HTTP requests", "route", "status")
        self._busy = counter("paceline_engine_busy_seconds", "Seconds in which the engine computed a row")
        self._queued_s = histogram("paceline_row_queued_seconds", "From a row's request to the engine's start")
        self._forward_s = histogram("paceline_row_forward_seconds", "The engine's time for a row")
        self._send_s = histogram("paceline_row_send_seconds", "From computed features to the end of the reply")
        self._lock = threading.Lock()
        self._spans: deque[tuple[float, float]] = deque()
        """(end, busy seconds) of recent rows, for the utilisation."""
        self._recent_s: deque[float] = deque(maxlen=_RECENT_ROWS)
        self._started = time.monotonic()
        self.watch("paceline_engine_utilisation", "Share of the last minute that the engine computed", self.utilisation)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def row_computed(self, num_tokens: int, queued_s: float, computed_s: float) -> None:
        """A row has left the engine just now."""
        self._computed.inc()
        self._computed_tokens.inc(num_tokens)
        self._queued_s.observe(queued_s)
        self._forward_s.observe(computed_s)
        now = time.monotonic()
        with self._lock:
            self._spans.append((now, computed_s))
            self._recent_s.append(computed_s)
            while self._spans[0][0] < now - _WINDOW_S:
                self._spans.popleft()
        self._busy.inc(computed_s)

    def row_sent(self, num_tokens: int, num_bytes: int, send_s: float, *, is_part: bool) -> None:
        """The reply to a row, or to a part of one, has left."""
        self._rows.labels("sent").inc()
        self._parts.inc(is_part)
        self._tokens.inc(num_tokens)
        self._bytes.inc(num_bytes)
        self._send_s.observe(send_s)

    def row_lost(self, outcome: str) -> None:
        """A row was not answered with features: an ErrorKind, or "left" where the client left."""
        self._rows.labels(outcome).inc()

    def request(self, route: str, status: int) -> None:
        """An HTTP request is over."""
        self._requests.labels(route, str(status)).inc()

    def seconds_per_row(self) -> float:
        """Of recent rows; 0 before the first."""
        with self._lock:
            return sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0

    def utilisation(self) -> float:
        """0..1, over the last minute, or since the start if that is shorter."""
        now = time.monotonic()
        with self._lock:
            busy_s = sum(seconds for end, seconds in self._spans if end >= now - _WINDOW_S)
        return min(1.0, busy_s / max(min(_WINDOW_S, now - self._started), 1e-3))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)
