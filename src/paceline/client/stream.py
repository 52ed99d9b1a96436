"""The feature stream: rows in training order, asked for ahead of time."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from paceline.client.budget import OwnRows, PrefetchBudget, Reservation
from paceline.client.pool import FeaturePool
from paceline.errors import CheckpointError, RowKillsServersError, StoppedError, TransportError
from paceline.schema.features import FeatureRow
from paceline.schema.layout import reply_bytes
from paceline.schema.parts import WHOLE, Part
from paceline.schema.rows import Row, RowRequest, request_features
from paceline.transport.base import Delivery

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Totals since the stream was opened, and what is in flight now."""

    wait_s: float
    """Time the trainer waited for rows."""
    rows_in_flight: int
    """Rows of this stream asked for and not yet done with."""
    bytes_in_flight: int
    rows_received: int
    """Rows handed to the trainer."""
    bytes_received: int
    rows_retried: int
    """Rows of the whole pool that were lost and asked for again."""
    rows_asked_ahead: int
    """Rows handed out when the next one had been asked for already."""
    rows_not_asked_ahead: int
    """Rows handed out when it had not; the last row has no next one and is neither."""
    transfer_s: float
    """Time from the heads of replies to their delivery."""


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    row: Row
    request: RowRequest
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    row: Row
    reservation: Reservation
    answer: Future[Delivery]
    since: float


@dataclass(frozen=True, slots=True, eq=False)
class _Current:
    """The row the trainer has."""

    delivery: Delivery
    reservation: Reservation


class FeatureStream:
    """Rows in the order of their positions, each asked for before its turn. Iterate over it, in one thread.

    consumes: rows of a row source      waits for: the oldest outstanding reply
    unblocked by: a reply, a free place in the prefetch budget, close()

    A row is valid until the next one is asked for; then its tensors are emptied. Look-ahead ends only at the end of
    `positions`: it crosses epochs, evaluations and checkpoints.
    """

    def __init__(
        self,
        rows: Callable[[int], Row],
        pool: FeaturePool,
        budget: PrefetchBudget,
        spec: str,
        positions: Sequence[int],
        *,
        part: Part = WHOLE,
        own_rows: int = 0,
        row_timeout_s: float = 600.0,
        log_every_s: float = 30.0,
    ) -> None:
        """Ask for nothing yet; the first row asked of the stream starts the look-ahead.

        Args:
            rows: the row at a position (`RowSource.row`).
            budget: of this trainer rank, shared by its streams.
            spec: name of the features, as registered with the pool.
            positions: what to go through, ascending: a rank's share of all epochs, or a range.
            part: what is wanted of each row; parts need a pool with a group.
            own_rows: rows this stream may have in flight beyond the budget; 1 for evaluation.
            row_timeout_s: waiting longer for one row is an error.
            log_every_s: a wait says so this often.

        Raises:
            ConfigError: the pool knows no such features.
        """
        self._rows = rows
        self._pool = pool
        self._budget = budget
        self._spec_name = spec
        self._spec = pool.spec(spec)
        self._positions = positions
        self._part = part
        self._own = OwnRows(own_rows)
        self._row_timeout_s = row_timeout_s
        self._log_every_s = log_every_s
        self._lock = threading.Lock()
        """Guards what close() touches: `_asked`, `_current`, `_closed`."""
        self._asked: deque[_Asked] = deque()
        self._current: _Current | None = None
        self._closed = False
        self._planned: _Planned | None = None
        self._num_asked = 0
        """How many of `_positions` were asked for, or lie before where the stream began; likewise the next."""
        self._num_handed_out = 0
        self._wait_s = 0.0
        self._rows_received = 0
        self._bytes_received = 0
        self._rows_asked_ahead = 0
        self._rows_not_asked_ahead = 0
        self._transfer_s = 0.0

    def __iter__(self) -> Iterator[FeatureRow]:
        return self

    def __next__(self) -> FeatureRow:
        """The next row; the one before is done with.

        Raises:
            CaptureMismatchError: the reply was intact and wrong.
            TransportError: the row was lost too often, or did not come within `row_timeout_s`.
            RowKillsServersError: servers die of the row; names it and its samples.
            StoppedError: the stream or the pool was closed.
        """
        started = time.monotonic()
        self._let_go_of_current()
        try:
            asked = self._oldest_answered(started)
        finally:
            self._wait_s += time.monotonic() - started
        if asked is None:
            raise StopIteration
        delivery = _result(asked)
        with self._lock:
            self._check_open()
            self._asked.popleft()
            self._current = _Current(delivery, asked.reservation)
            next_is_asked = bool(self._asked)
        features = delivery.take()
        self._num_handed_out += 1
        self._rows_received += 1
        self._bytes_received += features.num_bytes
        self._transfer_s += features.transfer_s
        if self._num_handed_out < len(self._positions):
            self._rows_asked_ahead += next_is_asked
            self._rows_not_asked_ahead += not next_is_asked
        return FeatureRow(asked.row, features)

    def state_dict(self) -> dict[str, int]:
        """{"position": the next position to train}, whatever was asked for beyond; also after `close`."""
        positions, done = self._positions, self._num_handed_out
        if done < len(positions):
            return {"position": positions[done]}
        return {"position": positions[-1] + 1 if positions else 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from the first of its positions that is not before that of `state`; what was asked for is dropped.

        Raises:
            CheckpointError: a negative position.
        """
        position = state["position"]
        if position < 0:
            raise CheckpointError(f"the stream cannot go on at position {position}: its positions begin at 0")
        self._let_go_of_current()
        self._drop_asked()
        self._planned = None
        self._num_asked = self._num_handed_out = bisect_left(self._positions, position)

    @property
    def stats(self) -> StreamStats:
        with self._lock:
            held = [asked.reservation for asked in self._asked]
            if self._current is not None:
                held.append(self._current.reservation)
        return StreamStats(
            wait_s=self._wait_s,
            rows_in_flight=len(held),
            bytes_in_flight=sum(reservation.num_bytes for reservation in held),
            rows_received=self._rows_received,
            bytes_received=self._bytes_received,
            rows_retried=self._pool.stats.rows_retried,
            rows_asked_ahead=self._rows_asked_ahead,
            rows_not_asked_ahead=self._rows_not_asked_ahead,
            transfer_s=self._transfer_s,
        )

    def close(self) -> None:
        """End the stream, from any thread: whoever waits in it gets StoppedError. Safe to call twice.

        The row handed out last stays valid: another thread may be training on it.
        """
        with self._lock:
            self._closed = True
            current, self._current = self._current, None
        if current is not None:
            self._budget.give_back(current.reservation)
        self._drop_asked()
        self._budget.signal_change()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _oldest_answered(self, started: float) -> _Asked | None:
        """The oldest row asked for, once it is answered; None at the end of the positions."""
        next_log = started + self._log_every_s
        while True:
            seen = self._budget.num_changes  # before looking, so that nothing is missed between looking and waiting
            self._ask_ahead()
            with self._lock:
                self._check_open()
                oldest = self._asked[0] if self._asked else None
            if oldest is None and self._planned is None:
                return None
            if oldest is not None and oldest.answer.done():
                return oldest
            if oldest is None and self._budget.wait_until_freed():
                continue
            now = time.monotonic()
            if now >= started + self._row_timeout_s:
                raise TransportError(f"{self._missing(oldest, now - started)}; transport.row_timeout_s is over")
            if now >= next_log:
                _logger.warning("%s", self._missing(oldest, now - started))
                next_log = now + self._log_every_s
            self._budget.wait_for_change(seen, min(next_log, started + self._row_timeout_s) - now)

    def _ask_ahead(self) -> None:
        """Ask for rows, in order, as long as the budget has places."""
        while not self._closed:
            planned = self._plan_next()
            if planned is None:
                return
            reservation = self._budget.reserve(planned.num_bytes, self._own)
            if reservation is None:
                return
            try:
                answer = self._pool.submit(planned.request)
            except BaseException:
                self._budget.give_back(reservation)
                raise
            self._planned = None
            self._num_asked += 1
            asked = _Asked(planned.row, reservation, answer, time.monotonic())
            with self._lock:
                closed = self._closed
                if not closed:
                    self._asked.append(asked)
            answer.add_done_callback(lambda _answer: self._budget.signal_change())
            if closed:
                self._drop(asked)

    def _plan_next(self) -> _Planned | None:
        if self._planned is None and self._num_asked < len(self._positions):
            position = self._positions[self._num_asked]
            row = self._rows(position)
            assert row.position == position, f"row source gave position {row.position} for {position}"
            info = self._pool.info
            request = request_features(row, self._spec_name, info.num_position_axes, self._part)
            self._planned = _Planned(row, request, reply_bytes(request, self._spec, info, self._part))
        return self._planned

    def _let_go_of_current(self) -> None:
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            current.delivery.release()
            self._budget.give_back(current.reservation, current.delivery)

    def _drop_asked(self) -> None:
        with self._lock:
            dropped, self._asked = self._asked, deque()
        for asked in dropped:
            self._drop(asked)

    def _drop(self, asked: _Asked) -> None:
        """Give up a row; it counts against the budget until its reply has come and is thrown away."""

        def throw_away(answer: Future[Delivery]) -> None:
            if answer.exception() is None:
                answer.result().release()
            self._budget.give_back(asked.reservation)

        asked.answer.add_done_callback(throw_away)

    def _check_open(self) -> None:
        if self._closed:
            raise StoppedError(f"the stream of {self._spec_name!r} rows was closed")

    def _missing(self, oldest: _Asked | None, waited_s: float) -> str:
        budget = self._budget
        if oldest is None:
            return (
                f"waiting {waited_s:.0f} s for room to ask for {self._spec_name!r} rows: all of the prefetch budget is "
                f"held by other streams ({budget.rows_in_flight} rows, {budget.bytes_in_flight} bytes)"
            )
        with self._lock:
            num_asked, num_missing = len(self._asked), sum(not asked.answer.done() for asked in self._asked)
        return (
            f"waiting {waited_s:.0f} s for the features of row {oldest.row.position} ({self._spec_name!r}, row id "
            f"{oldest.row.row_id}, {oldest.row.num_tokens} tokens), asked for {time.monotonic() - oldest.since:.0f} s "
            f"ago; {num_missing} of {num_asked} rows asked for are not answered"
        )


def _result(asked: _Asked) -> Delivery:
    """The answer; an error that is the row's own doing names what the row holds."""
    try:
        return asked.answer.result()
    except RowKillsServersError as error:
        samples = ", ".join(str(sample) for sample in asked.row.sample_ids)
        raise RowKillsServersError(
            f"{error}; it is row id {asked.row.row_id} of epoch {asked.row.epoch}, {asked.row.num_tokens} tokens of "
            f"samples {samples}: look at them, and at the servers' logs"
        ) from error
