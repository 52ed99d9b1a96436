"""The pool: rows spread over servers, checked when they come back, asked for again when they were lost."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from paceline.client.checks import check_reply, check_specs, check_target
from paceline.client.connection import Connection
from paceline.errors import ConfigError, PacelineError, ServerBusyError, StoppedError, TransportError
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.transport.base import Delivery

_FIRST_BACKOFF_S = 0.02
_LONGEST_BACKOFF_S = 2.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Totals since the pool was opened."""

    rows_received: int = 0
    bytes_received: int = 0
    rows_retried: int = 0
    """Rows asked for again because a reply was lost or damaged."""
    busy_replies: int = 0
    """Requests refused by a full queue, and made again later."""
    late_replies: int = 0
    """Replies to rows already answered or given up; dropped."""
    queued_s: float = 0.0
    """Time rows waited at servers."""
    computed_s: float = 0.0
    """Time servers computed."""


@dataclass(slots=True, eq=False)
class _Member:
    connection: Connection
    tokens_outstanding: int = 0


@dataclass(slots=True, eq=False)
class _Order:
    """A row somebody waits for, over all attempts."""

    request: RowRequest
    spec: FeatureSpec
    answer: Future[Delivery]
    num_lost: int = 0
    num_refused: int = 0
    over: bool = False


@dataclass(slots=True, eq=False)
class _Attempt:
    """One time a row was asked of one server."""

    order: _Order
    member: _Member
    outstanding: bool = True


class FeaturePool:
    """Features of rows from several interchangeable servers.

    Thread-safe. Replies are checked on the thread that brings them; no lock is held while a server or a waiter is
    called.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        specs: Mapping[str, FeatureSpec],
        row_retries: int = 5,
        expected: TargetInfo | None = None,
    ) -> None:
        """Open a session on each of `connections`, which the pool closes.

        Args:
            specs: what rows may ask for, by name.
            row_retries: how often a row that was lost is asked for again.
            expected: the target that the run was prepared for; None takes the first server's.

        Raises:
            HandshakeError: a server has another target than expected, or lacks a capture layer.
        """
        assert connections, "a pool needs a server"
        self._info = expected if expected is not None else connections[0].info()
        self._specs = dict(specs)
        self._row_retries = row_retries
        self._members = [_Member(connection) for connection in connections]
        self._orders: set[_Order] = set()
        self._stats = PoolStats()
        self._lock = threading.Lock()
        self._closed = False
        for connection in connections:
            check_target(connection.name, connection.info(), self._info)
            check_specs(connection.name, connection.info(), specs)
        try:
            for connection in connections:
                connection.open_session(specs)
        except PacelineError:
            self.close()
            raise

    @property
    def info(self) -> TargetInfo:
        """The facts every server of the pool agrees on."""
        return self._info

    @property
    def stats(self) -> PoolStats:
        return self._stats

    def spec(self, name: str) -> FeatureSpec:
        """The features registered under `name`.

        Raises:
            ConfigError: there are none.
        """
        if name not in self._specs:
            raise ConfigError(f"no features are registered as {name!r}; there are {', '.join(sorted(self._specs))}")
        return self._specs[name]

    def submit(self, request: RowRequest) -> Future[Delivery]:
        """The row's checked features.

        The future fails with CaptureMismatchError for an intact reply that is wrong, TransportError when the row was
        lost more than `row_retries` times, StoppedError after `close`, or the server's own error.
        """
        order = _Order(request, self.spec(request.spec), Future())
        order.answer.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise StoppedError(f"the pool is closed: row {request.position} is not asked for")
            self._orders.add(order)
        self._ask(order)
        return order.answer

    def close(self) -> None:
        """Release all sessions; rows not yet answered fail with StoppedError. Safe to call twice."""
        with self._lock:
            self._closed = True
            orders = list(self._orders)
        for order in orders:
            self._fail(order, StoppedError(f"the pool was closed before row {order.request.position} came"))
        for member in self._members:
            member.connection.close()

    def _ask(self, order: _Order, avoid: _Member | None = None) -> None:
        """Ask the server with the least work outstanding; the one that just lost the row only if there is no other."""
        with self._lock:
            if order.over:
                return
            others = [member for member in self._members if member is not avoid] or self._members
            member = min(others, key=lambda candidate: candidate.tokens_outstanding)
            member.tokens_outstanding += len(order.request.tokens)
            attempt = _Attempt(order, member)
        try:
            reply = member.connection.request(order.request)
        except PacelineError as error:
            self._count_back(attempt)
            self._handle_failure(attempt, error)
            return
        reply.add_done_callback(partial(self._on_reply, attempt))

    def _on_reply(self, attempt: _Attempt, reply: Future[Delivery]) -> None:
        """Settle one attempt. An error in a callback is lost, so every one goes to whoever waits for the row."""
        if not self._count_back(attempt):
            self._count_late()  # the same reply told twice; the first telling has settled it
            return
        if reply.cancelled():
            self._fail(attempt.order, StoppedError(f"row {attempt.order.request.position} was cancelled"))
            return
        error = reply.exception()
        if error is not None:
            self._handle_failure(attempt, error)
            return
        try:
            self._accept(attempt, reply.result())
        except BaseException as failure:
            self._handle_failure(attempt, failure)

    def _accept(self, attempt: _Attempt, delivery: Delivery) -> None:
        order = attempt.order
        if not order.over:
            with delivery.inspect():
                server = attempt.member.connection.name
                check_reply(server, order.request, order.spec, self._info, delivery.features)
        if not self._finish(order):
            self._count_late()
            delivery.release()
            return
        features = delivery.features
        with self._lock:
            stats = self._stats
            self._stats = replace(
                stats,
                rows_received=stats.rows_received + 1,
                bytes_received=stats.bytes_received + features.num_bytes,
                queued_s=stats.queued_s + features.queued_s,
                computed_s=stats.computed_s + features.computed_s,
            )
        order.answer.set_result(delivery)

    def _handle_failure(self, attempt: _Attempt, error: BaseException) -> None:
        order, server = attempt.order, attempt.member.connection.name
        if isinstance(error, ServerBusyError):
            self._ask_later(order)
        elif isinstance(error, PacelineError) and error.retryable:
            self._ask_again(attempt, error)
        else:
            if not isinstance(error, StoppedError):
                error.add_note(f"row at position {order.request.position}, features {order.request.spec!r}, {server}")
            self._fail(order, error)

    def _ask_again(self, attempt: _Attempt, error: PacelineError) -> None:
        order, server = attempt.order, attempt.member.connection.name
        with self._lock:
            if order.over:
                return
            order.num_lost += 1
            exhausted = order.num_lost > self._row_retries
            if not exhausted:
                self._stats = replace(self._stats, rows_retried=self._stats.rows_retried + 1)
        if exhausted:
            lost = TransportError(
                f"row {order.request.position} was lost {order.num_lost} times (asked for again "
                f"{self._row_retries} times at most); the last time by {server}: {error}"
            )
            lost.__cause__ = error
            self._fail(order, lost)
            return
        _logger.warning(
            "row %d was lost by %s and is asked for again (%d of %d): %s",
            order.request.position,
            server,
            order.num_lost,
            self._row_retries,
            error,
        )
        self._ask(order, avoid=attempt.member)

    def _ask_later(self, order: _Order) -> None:
        """A full queue is no fault of the row: it is tried until whoever waits for it gives up."""
        with self._lock:
            self._stats = replace(self._stats, busy_replies=self._stats.busy_replies + 1)
            backoff_s = min(_FIRST_BACKOFF_S * 2.0 ** min(order.num_refused, 30), _LONGEST_BACKOFF_S)
            order.num_refused += 1
        timer = threading.Timer(backoff_s * random.uniform(0.5, 1.5), self._ask, (order,))
        timer.daemon = True
        timer.start()

    def _count_back(self, attempt: _Attempt) -> bool:
        """Whether this is the first answer to the attempt."""
        with self._lock:
            first, attempt.outstanding = attempt.outstanding, False
            if first:
                attempt.member.tokens_outstanding -= len(attempt.order.request.tokens)
        return first

    def _count_late(self) -> None:
        with self._lock:
            self._stats = replace(self._stats, late_replies=self._stats.late_replies + 1)

    def _fail(self, order: _Order, error: BaseException) -> None:
        if self._finish(order):
            order.answer.set_exception(error)

    def _finish(self, order: _Order) -> bool:
        """Whether the caller is the one to answer the order: the first one is."""
        with self._lock:
            first, order.over = not order.over, True
            self._orders.discard(order)
        return first
