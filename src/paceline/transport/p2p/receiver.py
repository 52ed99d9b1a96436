"""The client's end of a p2p channel."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from torch import Tensor

from paceline.errors import CaptureMismatchError, PacelineError, TransportError, WireError
from paceline.schema.layout import layout_bytes
from paceline.schema.protocol import ReplyHeader
from paceline.transport.base import Incoming, RowBuffer
from paceline.transport.delivery import RowDelivery
from paceline.transport.p2p.communicator import Communicator
from paceline.transport.p2p.epochs import propose
from paceline.transport.p2p.link import Link
from paceline.transport.p2p.memory import RowMemory

logger = logging.getLogger(__name__)

_JOIN_S = 10.0
_LOG_EVERY_S = 30.0


@dataclass(slots=True, eq=False)
class _Row:
    """A row whose header has come."""

    epoch: int
    number: int
    memory: Tensor
    buffer: RowBuffer | None
    """Given back when the row is over; None if somebody waits for it."""
    since: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        if self.buffer is not None:
            self.buffer.give_back()
        self.over.set()


class P2PReceiver:
    """Receives rows by number into memory reserved before they were asked for.

    consumes: headers, from threads of HTTP connections in any order
    waits for: the tensors, on a thread of its own      unblocked by: stall_timeout_s, close()

    Begins the first epoch at once, and another when one is over and a row is to be asked for.
    """

    def __init__(self, link: Link, memory: RowMemory) -> None:
        """A thread begins to connect; `connect` waits for it."""
        self._link = link
        self._memory = memory
        self._changed = threading.Condition()
        self._rows: dict[tuple[int, int], _Row] = {}
        """By epoch and number; those that are being received included."""
        self._epoch = 0
        """The one that is open, or was last."""
        self._communicator: Communicator | None = None
        self._next_number = 0
        self._in_transit: _Row | None = None
        self._moved_at = 0.0
        """When a row came last."""
        self._is_wanted = True
        """An epoch is to begin as soon as none is open."""
        self._last_failure: BaseException | None = None
        self._num_failures = 0
        self._is_closed = False
        self._abort: threading.Thread | None = None
        """The one begun last."""
        self._thread = threading.Thread(target=self._run, name=f"{link.kind} receiver", daemon=True)
        self._thread.start()

    def connect(self) -> None:
        """Return when an epoch is open; begins one if need be.

        Raises:
            TransportError: it could not begin.
        """
        with self._changed:
            num_failures = self._num_failures
            self._want()
            self._changed.wait_for(
                lambda: self._is_closed or self._communicator is not None or self._num_failures > num_failures,
                4 * self._link.timeout_s,  # the thread may have an attempt to end first
            )
            if self._communicator is None:
                reason = self._last_failure or ("it was closed" if self._is_closed else "nothing happened in time")
                raise TransportError(f"no channel by {self._link.kind}: {reason}")

    def reserve(self, num_bytes: int) -> RowBuffer:
        """Memory for a row that is about to be asked for, when there is a channel for it to come by.

        Raises:
            TransportError: the channel could not be opened (anew).
            OutOfMemoryError: the device has no memory; names the settings.
        """
        self.connect()
        return self._memory.reserve(num_bytes)

    def receive(self, parcel: Incoming) -> RowDelivery:
        num_bytes = layout_bytes(parcel.layout)
        row = self._row(parcel.header, parcel.buffer.memory[:num_bytes], None)
        if parcel.header.num_bytes != num_bytes:
            self.drop(parcel.header)
            raise CaptureMismatchError(
                f"the reply to row {parcel.header.position} announces {parcel.header.num_bytes} bytes of features, "
                f"{num_bytes} were asked for"
            )
        self._add(row)
        while not row.over.wait(_LOG_EVERY_S):
            logger.info(
                "row %d has waited %.0f s for its tensors by %s (number %d of epoch %d)",
                parcel.header.position,
                time.monotonic() - row.since,
                self._link.kind,
                row.number,
                row.epoch,
            )
        if row.error is not None:
            raise row.error
        return self._memory.deliver(parcel)

    def drop(self, header: ReplyHeader) -> None:
        """Receive what belongs to `header` and throw it away, so that the rows behind it can come."""
        try:
            buffer = self._memory.reserve(header.num_bytes)
        except (PacelineError, MemoryError) as error:
            self._break_off(f"no memory for a row that nobody wants: {error}")
            return
        self._add(self._row(header, buffer.memory[: header.num_bytes], buffer))

    def lost(self, position: int) -> None:
        """No reply came for this row: the epoch is over, as its tensors may come or not."""
        self._break_off(f"the reply to row {position} was lost")

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._give_up("the channel was closed")
            self._fail_rows(TransportError("the channel was closed"))
            self._changed.notify_all()
        for thread in (self._thread, self._abort):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _row(self, header: ReplyHeader, memory: Tensor, buffer: RowBuffer | None) -> _Row:
        if header.channel_epoch is None or header.channel_number is None:
            raise WireError(
                f"the reply to row {header.position} names no epoch and number of the {self._link.kind} channel"
            )
        return _Row(header.channel_epoch, header.channel_number, memory, buffer)

    def _add(self, row: _Row) -> None:
        with self._changed:
            if self._is_closed:
                row.end(TransportError("the channel was closed"))
            elif row.epoch < self._epoch or (row.epoch == self._epoch and self._communicator is None):
                row.end(TransportError(f"it came on epoch {row.epoch} of the channel, which is over"))
            elif (row.epoch, row.number) in self._rows:
                row.end(TransportError(f"two replies are number {row.number} of epoch {row.epoch}"))
            else:
                self._rows[row.epoch, row.number] = row
                if row.epoch > self._epoch:
                    self._give_up("the server has begun to number another")
                    self._want()
                self._changed.notify_all()

    def _break_off(self, reason: str) -> None:
        with self._changed:
            if self._communicator is None:
                self._epoch += 1  # the server may have numbered the row in the one that is about to begin
                self._fail_rows(
                    TransportError(f"epoch {self._epoch} of the channel never began: {reason}"), self._epoch
                )
            self._give_up(reason)

    def _want(self) -> None:
        """An epoch is needed now; the lock is held."""
        if self._communicator is None and not self._is_wanted and not self._is_closed:
            self._is_wanted = True
            self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        """The open epoch is over, its rows are lost; the lock is held."""
        if self._communicator is None:
            return
        level = logging.DEBUG if self._is_closed else logging.WARNING
        logger.log(level, "epoch %d of the %s channel is over: %s", self._epoch, self._link.kind, reason)
        self._abort = threading.Thread(target=self._communicator.abort, name="abort of a channel", daemon=True)
        self._abort.start()
        self._communicator = None
        self._fail_rows(TransportError(f"epoch {self._epoch} of the channel is over: {reason}"), self._epoch)
        self._changed.notify_all()

    def _fail_rows(self, error: BaseException, up_to_epoch: int | None = None) -> None:
        """All but the one whose memory is being written to: the thread does that; the lock is held."""
        for place, row in list(self._rows.items()):
            if row is not self._in_transit and (up_to_epoch is None or row.epoch <= up_to_epoch):
                del self._rows[place]
                row.end(error)

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:  # handed to those who wait
            logger.exception("the receiver of the %s channel failed", self._link.kind)
            with self._changed:
                self._is_closed = True
                self._last_failure = error
                self._in_transit = None
                self._fail_rows(error)
                self._changed.notify_all()

    def _step(self) -> bool:
        """One thing that is to be done; False at the end."""
        with self._changed:
            while not self._is_closed and not self._needs_epoch() and self._next_row() is None:
                self._changed.wait(self._check_overtaken())
            if self._is_closed:
                return False
            communicator = self._communicator
            if communicator is not None:
                row = self._in_transit = self._next_row()
        if communicator is None:
            self._begin()
        elif row is not None:
            self._take(row, communicator)
        return True

    def _needs_epoch(self) -> bool:
        return self._communicator is None and self._is_wanted

    def _next_row(self) -> _Row | None:
        return self._rows.get((self._epoch, self._next_number)) if self._communicator is not None else None

    def _check_overtaken(self) -> float | None:
        """Seconds until a header that others have overtaken is lost; None if there is none. The lock is held."""
        if self._communicator is None or not self._rows:
            return None
        since = max(self._moved_at, min(row.since for row in self._rows.values()))
        left_s = since + self._link.timeout_s - time.monotonic()
        if left_s > 0:
            return left_s
        self._give_up(f"the header of row {self._next_number} did not come within {self._link.timeout_s:g} s of others")
        return 0.0

    def _begin(self) -> None:
        """Try to open an epoch."""
        with self._changed:
            self._is_wanted = False
            at_least = max([self._epoch + 1, *(epoch for epoch, _ in self._rows)])
        try:
            joined = propose(self._link.ask, at_least, self._link.timeout_s, self._is_over)
            communicator = self._link.connect(joined.epoch, joined.nonce, self._is_over)
        except PacelineError as error:  # a call to the server may fail in other ways than the channel
            with self._changed:
                # once, as every row that is asked for tries again
                level = logging.DEBUG if self._is_closed or self._last_failure is not None else logging.WARNING
                logger.log(level, "epoch %d of the %s channel could not begin: %s", at_least, self._link.kind, error)
                self._num_failures += 1
                self._last_failure = error
                self._epoch = max(self._epoch, at_least)
                self._fail_rows(TransportError(f"the channel could not be opened anew: {error}"))
                self._changed.notify_all()
            return
        with self._changed:
            if joined.epoch <= self._epoch:
                self._is_wanted = True
            elif not self._is_closed:
                self._epoch, self._next_number, self._communicator = joined.epoch, 0, communicator
                self._last_failure = None
                self._fail_rows(TransportError("it came on an epoch of the channel that never began"), joined.epoch - 1)
                self._changed.notify_all()
                return
        communicator.abort()

    def _is_over(self) -> bool:
        return self._is_closed

    def _take(self, row: _Row, communicator: Communicator) -> None:
        error: BaseException | None = None
        try:
            if row.memory.numel():
                communicator.receive(row.memory, self._link.timeout_s)
        except TransportError as failure:
            error = failure
        with self._changed:
            self._in_transit = None
            self._rows.pop((row.epoch, row.number), None)
            self._moved_at = time.monotonic()
            if error is None:
                self._next_number += 1
            else:
                self._give_up(f"row {row.number} was lost: {error}")
        row.end(error)
