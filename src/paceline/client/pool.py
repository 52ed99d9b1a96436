"""The pool: rows spread over servers, checked when they come back, asked for again when they were lost."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial

from paceline.client.assignments import Assignments, Attempt, Link, Order
from paceline.client.checks import check_reply
from paceline.client.clock import Clock
from paceline.client.closing import Closing
from paceline.client.membership import Membership
from paceline.client.pool_stats import AnswerTimes, PoolStats, PoolTotals, ServerStats, ServerTotals
from paceline.client.server_list import ServerList
from paceline.config.placement import PoolConfig
from paceline.errors import (
    AuthorizationError,
    ConfigError,
    DamagedError,
    HandshakeError,
    PacelineError,
    RowKillsServersError,
    ServerBusyError,
    ServerLostError,
    StoppedError,
    TransportError,
)
from paceline.schema.features import FeatureSpec
from paceline.schema.limits import RowSizes
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.transport.base import Delivery

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 2.0
_LONGEST_BUSY_S = 30.0
"""A server may ask for more patience than this; it is asked all the same."""
_LOOK_EVERY_S = 0.1
_logger = logging.getLogger(__name__)


class FeaturePool:
    """Features of rows from several interchangeable servers, which may die, hang, return, join and leave.

    consumes: rows of any thread      waits for: replies; a server, when none is up
    unblocked by: a reply, a server's death (its rows go elsewhere), a server that joins, close()

    A row goes to the server with the least work outstanding. One that takes too long is asked for from a second server
    as well, and the first valid reply counts. A row that was in flight at three deaths of servers is asked for alone.

    Thread-safe. Replies are checked on the thread that brings them; no lock is held while a server or a waiter is
    called.
    """

    def __init__(
        self,
        servers: ServerList,
        specs: Mapping[str, FeatureSpec],
        settings: PoolConfig,
        expected: TargetInfo | None = None,
        *,
        sizes: RowSizes | None = None,
        group: str | None = None,
        log_every_s: float = 30.0,
    ) -> None:
        """Return when one server is up; the others join when they can.

        Args:
            specs: what rows may ask for, by name.
            expected: the target that the run was prepared for; None takes that of the first server that answers.
            sizes: of the largest rows that will be asked for: a server that does not take them is the wrong one.
            group: where rows are asked for in parts, what the ranks of this sequence-parallel group know and nobody
                else does: 32 to 64 hex digits, drawn anew for each run. Servers compute a row once for all of them.
            log_every_s: a wait for servers says so this often.

        Raises:
            HandshakeError: a server has another target than expected, lacks a capture layer, or takes no such rows.
            AuthorizationError: a server refuses our token.
            ServerLostError: no server was up within `settings.all_down_timeout_s`; names the reason of each.
        """
        self._specs = dict(specs)
        self._settings = settings
        self._log_every_s = log_every_s
        self._lock = threading.Lock()
        """Guards everything below, down to `_ended`."""
        self._rows = Assignments()
        self._orders: set[Order] = set()
        """Those not over."""
        self._order_numbers = itertools.count()
        self._totals = PoolTotals()
        self._server_totals: dict[str, ServerTotals] = {}
        self._answer_times = AnswerTimes()
        self._none_up_since: float | None = time.monotonic()
        self._next_log = 0.0
        self._ended: BaseException | None = None
        """Why no row is taken any more: `close`, or a bug."""
        self._dispatching = threading.local()
        self._closing = Closing(self.fail)
        self._clock = Clock("pool-clock", self.fail)
        self._membership = Membership(servers, specs, sizes or RowSizes(), expected, group, self._closing, self)
        try:
            self._info = self._membership.wait_for_first(settings.all_down_timeout_s, log_every_s)
        except BaseException:
            self.close()
            raise
        self._look()

    @property
    def info(self) -> TargetInfo:
        """The facts every server of the pool agrees on."""
        return self._info

    @property
    def stats(self) -> PoolStats:
        with self._lock:
            links = self._rows.links
            servers = {}
            for name, totals in self._server_totals.items():
                link = links.get(name)
                servers[name] = ServerStats(
                    totals=dataclasses.replace(totals),
                    up=link is not None,
                    rows_outstanding=len(link.attempts) if link is not None else 0,
                    tokens_outstanding=link.tokens_outstanding if link is not None else 0,
                )
            return PoolStats(
                **dataclasses.asdict(self._totals),
                rows_waiting=len(self._rows.waiting),
                servers_up=sum(link.is_server for link in links.values()),
                answer_p50_s=self._answer_times.percentile(50),
                answer_p95_s=self._answer_times.percentile(95),
                servers=servers,
            )

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
        lost more than `row_retries` times, RowKillsServersError when servers die of it, ServerLostError when no
        server was up for `all_down_timeout_s`, StoppedError after `close`, or the server's own error.
        """
        spec = self.spec(request.spec)
        with self._lock:
            if isinstance(self._ended, StoppedError):
                raise StoppedError(f"the pool is closed: row {request.position} is not asked for")
            if self._ended is not None:
                raise self._ended
            order = Order(request, spec, Future(), next(self._order_numbers))
            order.answer.set_running_or_notify_cancel()
            self._orders.add(order)
            self._rows.wait(order)
        self._dispatch()
        return order.answer

    def close(self) -> None:
        """Release all sessions; rows not yet answered fail with StoppedError. Safe to call twice, on any thread."""
        self._end(StoppedError("the pool was closed"))
        threads = self._membership.close()
        with self._lock:
            links = [*self._rows.links.values(), *self._rows.leaving]
            self._rows.links.clear()
            self._rows.leaving.clear()
        for link in links:
            self._closing.close(link.name, link.connection)
        self._closing.wait([*threads, *self._clock.close()])

    def join(self, link: Link) -> None:
        """Called by the membership: a session is open."""
        with self._lock:
            wanted = not link.leaving and self._ended is None
            if wanted:
                self._rows.links[link.name] = link
                self._server_totals.setdefault(link.name, ServerTotals())
                if link.is_server:
                    self._none_up_since, self._next_log = None, 0.0
        if not wanted:
            self._closing.close(link.name, link.connection)
        self._dispatch()

    def leave(self, link: Link) -> None:
        """Called by the membership: the server was taken from the list."""
        with self._lock:
            joined = self._rows.links.get(link.name) is link
            link.leaving = True
            if joined:
                self._rows.leave(link)
                self._note_whether_any_is_up()
        if joined:
            self._close_if_left(link)
            self._dispatch()

    def fail(self, error: BaseException) -> None:
        """Called by threads of the pool: a bug, for those who wait for rows."""
        self._end(error)

    def _end(self, reason: BaseException) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = reason
            orders = sorted(self._orders, key=lambda order: order.place)
        for order in orders:
            error = reason
            if isinstance(reason, StoppedError):
                error = StoppedError(f"the pool was closed before row {order.request.position} came")
            self._fail(order, error)

    def _dispatch(self) -> None:
        """Ask for every row that waits and that a server can be asked for now, in order of their positions."""
        if getattr(self._dispatching, "active", False):
            return  # this thread does it already, further up its stack: a request failed at once
        self._dispatching.active = True
        try:
            while True:
                with self._lock:
                    attempt = self._rows.next_attempt(time.monotonic())
                if attempt is None:
                    return
                self._send(attempt)
        finally:
            self._dispatching.active = False

    def _send(self, attempt: Attempt) -> None:
        try:
            reply = attempt.link.connection.request(attempt.order.request)
        except BaseException as error:
            # on whatever thread this is, the error belongs to whoever waits for the row
            attempt.sent = False
            self._on_error(attempt, error)
            return
        reply.add_done_callback(partial(self._on_reply, attempt))

    def _on_reply(self, attempt: Attempt, reply: Future[Delivery]) -> None:
        """Settle one attempt. An error in a callback is lost, so every one goes to whoever waits for the row."""
        with self._lock:
            repeated, attempt.answered = attempt.answered, True
            if repeated:
                self._totals.late_replies += 1  # the same reply told twice; the first telling has settled it
        if repeated:
            return
        if reply.cancelled():
            self._on_error(attempt, StoppedError(f"row {attempt.order.request.position} was cancelled"))
            return
        error = reply.exception()
        if error is not None:
            self._on_error(attempt, error)
            return
        with self._lock:
            # False when its server was given up: the row has gone elsewhere
            counts = self._rows.settle(attempt) and not attempt.order.over
        try:
            if counts:
                self._check(attempt, reply.result())
            self._accept(attempt, reply.result(), counts)
        except BaseException as failure:
            reply.result().release()
            self._fail(attempt.order, self._with_note(attempt, failure))
        self._after(attempt)

    def _check(self, attempt: Attempt, delivery: Delivery) -> None:
        order = attempt.order
        with delivery.inspect():
            check_reply(attempt.link.name, order.request, order.spec, self._info, delivery.features)

    def _accept(self, attempt: Attempt, delivery: Delivery, counts: bool) -> None:
        """Answer the order, if this is the first reply to it that counts; drop the delivery otherwise."""
        order, link, features = attempt.order, attempt.link, delivery.features
        answer_s = time.monotonic() - attempt.since
        with self._lock:
            first = counts and self._finish(order)
            totals, server = self._totals, self._server_totals[link.name]
            if first:
                link.num_refusals, link.paused_until = 0, 0.0
                if link.is_server:  # what is read from a disk says nothing of how long a server takes
                    self._answer_times.add(answer_s)
                totals.rows_received += 1
                totals.bytes_received += features.num_bytes
                totals.transfer_s += features.transfer_s
                totals.hedges_won += attempt.is_hedge
                server.rows += 1
                server.tokens += features.num_tokens
                server.answer_s += answer_s
                for each in (totals, server):
                    each.queued_s += features.queued_s
                    each.computed_s += features.computed_s
            else:
                totals.late_replies += 1
        if not first:
            delivery.release()
            return
        self._membership.proved(link)
        order.answer.set_result(delivery)

    def _on_error(self, attempt: Attempt, error: BaseException) -> None:
        """One attempt brought no features: the row is asked for again, later, elsewhere, or given up."""
        if isinstance(error, ServerLostError | HandshakeError | AuthorizationError):
            self._lose(attempt.link, error)  # connecting it anew shows whether it is still the right server
            return
        with self._lock:
            if not self._rows.settle(attempt):
                return  # its server was given up, and the row has gone elsewhere
        if isinstance(error, ServerBusyError):
            self._ask_later(attempt, error)
        elif isinstance(error, PacelineError) and error.retryable:
            self._ask_again(attempt, error)
        else:
            self._fail(attempt.order, self._with_note(attempt, error))
        self._after(attempt)

    def _with_note(self, attempt: Attempt, error: BaseException) -> BaseException:
        if not isinstance(error, StoppedError):
            request = attempt.order.request
            error.add_note(f"row at position {request.position}, features {request.spec!r}, {attempt.link.name}")
        return error

    def _after(self, attempt: Attempt) -> None:
        """A server has one row less: it may leave, or take one that waits."""
        self._close_if_left(attempt.link)
        self._dispatch()

    def _ask_again(self, attempt: Attempt, error: PacelineError) -> None:
        order, server, most = attempt.order, attempt.link.name, self._settings.row_retries
        with self._lock:
            if order.over:
                return
            order.num_lost += 1
            order.avoid = attempt.link
            exhausted = order.num_lost > most and not order.attempts
            # the first time at once: most faults are over by then; then slower and slower
            pause_s = 0.0 if order.num_lost < 2 else _backoff_s(order.num_lost - 2)
            order.not_before = time.monotonic() + pause_s
            self._totals.damaged_replies += isinstance(error, DamagedError)
            self._totals.rows_retried += not exhausted
            if not exhausted:
                self._rows.wait(order)
        if exhausted:
            lost = TransportError(
                f"row {order.request.position} was lost {order.num_lost} times (asked for again {most} times at most); "
                f"the last time by {server}: {error}"
            )
            lost.__cause__ = error
            self._fail(order, lost)
            return
        text = "row %d was lost by %s and is asked for again (%d of %d): %s"
        _logger.warning(text, order.request.position, server, order.num_lost, most, error)
        self._clock.call_at(order.not_before, self._dispatch)

    def _ask_later(self, attempt: Attempt, error: ServerBusyError) -> None:
        """A full queue is no fault of the row; the server is left alone for a while."""
        link = attempt.link
        with self._lock:
            self._totals.busy_replies += 1
            pause_s = _backoff_s(link.num_refusals)
            if error.retry_after_s is not None:
                pause_s = min(max(error.retry_after_s, 0.0), _LONGEST_BUSY_S) * random.uniform(1.0, 1.2)
            link.num_refusals += 1
            link.paused_until = time.monotonic() + pause_s
            self._rows.wait(attempt.order)
        self._clock.call_at(link.paused_until, self._dispatch)

    def _lose(self, link: Link, error: PacelineError) -> None:
        """A server is lost with every row it had: they go to the others, and it is connected anew."""
        with self._lock:
            if not link.alive:
                return
            link.alive = False
            attempts = self._rows.remove(link)
            died = isinstance(error, ServerLostError)
            self._totals.server_deaths += died
            self._server_totals[link.name].deaths += died
            killed = []
            for attempt in attempts:
                order = attempt.order
                if died and attempt.sent:  # a server found dead did not die of the row
                    order.deaths.append(link.name)
                if died and attempt.sent and attempt.alone:
                    killed.append(order)
                elif not order.over and not order.attempts:
                    self._totals.rows_moved += 1
                    self._rows.wait(order)
            self._note_whether_any_is_up()
        _logger.warning(
            "%s is lost with %d rows outstanding, which are asked for elsewhere: %s", link.name, len(attempts), error
        )
        self._membership.lost(link, error)
        self._closing.close(link.name, link.connection, abort=True)
        for order in killed:
            self._fail(order, _kills_servers(order, error))
        self._dispatch()

    def _close_if_left(self, link: Link) -> None:
        with self._lock:
            left = link in self._rows.leaving and not link.attempts
            if left:
                self._rows.leaving.discard(link)
        if left:
            self._closing.close(link.name, link.connection)

    def _note_whether_any_is_up(self) -> None:
        if self._none_up_since is None and not any(link.is_server for link in self._rows.links.values()):
            self._none_up_since = time.monotonic()

    def _look(self) -> None:
        """Ten times a second: rows that take too long, and servers that stay away."""
        self._hedge()
        self._check_servers()
        self._clock.call_at(time.monotonic() + _LOOK_EVERY_S, self._look)

    def _hedge(self) -> None:
        settings = self._settings
        with self._lock:
            limit_s = self._answer_times.limit_s(settings.hedge_factor, settings.hedge_after_rows)
            if limit_s is None or len(self._rows.links) < 2:
                return
            hedges = list(self._rows.hedges(time.monotonic(), limit_s))
            self._totals.rows_hedged += len(hedges)
        for hedge in hedges:
            _logger.info(
                "row %d has been out for more than %.1f s: %s is asked as well",
                hedge.order.request.position,
                limit_s,
                hedge.link.name,
            )
            self._send(hedge)

    def _check_servers(self) -> None:
        """With no server up and rows that wait: say so, and after `all_down_timeout_s` end."""
        now = time.monotonic()
        with self._lock:
            orders = list(self._rows.waiting)
            since = self._none_up_since
            if since is None or not orders:
                return
            over = now - since >= self._settings.all_down_timeout_s
            if not over and now < self._next_log:
                return
            self._next_log = now + self._log_every_s
        text = (
            f"no server has been up for {now - since:.0f} s, {len(orders)} rows wait, the first is row "
            f"{orders[0].request.position}:\n{self._membership.report()}"
        )
        if not over:
            _logger.warning("%s", text)
            return
        for order in orders:
            self._fail(order, ServerLostError(f"{text}\npool.all_down_timeout_s is over"))

    def _fail(self, order: Order, error: BaseException) -> None:
        with self._lock:
            first = self._finish(order)
        if first:
            order.answer.set_exception(error)

    def _finish(self, order: Order) -> bool:
        """Whether the caller is the one to answer the order: the first one is. The lock is held."""
        first, order.over = not order.over, True
        self._orders.discard(order)
        self._rows.forget(order)
        return first


def _backoff_s(num_before: int) -> float:
    return min(_FIRST_PAUSE_S * 2.0 ** min(num_before, 30), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)


def _kills_servers(order: Order, error: BaseException) -> RowKillsServersError:
    servers = ", ".join(dict.fromkeys(order.deaths))
    kills = RowKillsServersError(
        f"row {order.request.position} was in flight at {len(order.deaths)} deaths of servers ({servers}), the last "
        f"time alone: {error}"
    )
    kills.__cause__ = error
    return kills
