"""The server's end of a p2p channel."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial

from paceline.errors import OutOfMemoryError, PacelineError, ServerFailedError, TransportError
from paceline.schema.features import Features
from paceline.schema.wire import checksum
from paceline.transport.base import JSON, Reply, RowBuffer
from paceline.transport.feature_bytes import describe
from paceline.transport.p2p.communicator import Communicator
from paceline.transport.p2p.epochs import PROPOSAL, Proposal, join, proposed
from paceline.transport.p2p.link import Link
from paceline.transport.p2p.memory import RowMemory
from paceline.transport.p2p.store import SessionStore

logger = logging.getLogger(__name__)

_JOIN_S = 10.0


@dataclass(slots=True, eq=False)
class _Row:
    epoch: int
    number: int
    num_bytes: int
    buffer: RowBuffer
    is_announced: bool = False
    """Its header has left."""


class P2PSender:
    """Packs rows, announces them in headers, and sends them by number once their headers have left.

    consumes: features (`send`), headers that left (`Reply.sent`), the client's proposals
    waits for: the client's receives, on a thread of its own      unblocked by: stall_timeout_s, close()
    """

    def __init__(
        self, link: Link, store: SessionStore, memory: RowMemory, max_unsent_rows: int, max_unsent_bytes: int
    ) -> None:
        """The client has opened no epoch yet; rows are taken all the same.

        Args:
            store: the session's; `proposals_changed` must be told of every key that is set in it.
            max_unsent_rows: rows in memory; `send` waits for the client to take one.
            max_unsent_bytes: of these rows; a larger one is alone.
        """
        self._link = link
        self._store = store
        self._memory = memory
        self._max_unsent_rows = max_unsent_rows
        self._max_unsent_bytes = max_unsent_bytes
        self._changed = threading.Condition()
        self._epoch = 1
        """Rows are numbered in it, whether it has begun or not."""
        self._next_number = 0
        self._unsent: deque[_Row] = deque()
        self._communicator: Communicator | None = None
        self._last_joined: Proposal | None = None
        """The client's proposal that was answered last."""
        self._tried_epoch = 0
        self._is_closed = False
        self._abort: threading.Thread | None = None
        """The one begun last."""
        self._thread = threading.Thread(target=self._run, name=f"{link.kind} sender", daemon=True)
        self._thread.start()

    def send(self, position: int, features: Features) -> Reply:
        header, layout = describe(position, features)
        self._wait_for_room(header.num_bytes)
        try:
            buffer = self._memory.pack(features, layout)
        except OutOfMemoryError as error:
            raise ServerFailedError(f"row {position} could not be packed for sending: {error}") from error
        with self._changed:
            row = _Row(self._epoch, self._next_number, header.num_bytes, buffer)
            self._next_number += 1
            self._unsent.append(row)
        header = header.model_copy(update={"channel_epoch": row.epoch, "channel_number": row.number})
        body = header.model_dump_json().encode()
        return Reply((body,), JSON, checksum(body), partial(self._header_left, row))

    def proposals_changed(self, key: str) -> None:
        """A key of the store was set."""
        if key == PROPOSAL:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._give_up("the session has ended")
        for thread in (self._thread, self._abort):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _wait_for_room(self, num_bytes: int) -> None:
        with self._changed:
            timeout_s = self._link.timeout_s
            has_room = self._changed.wait_for(lambda: self._is_closed or self._has_room(num_bytes), timeout_s)
            if self._is_closed:
                raise TransportError("the channel is closed")
            if not has_room:
                self._give_up(f"the client took none of {len(self._unsent)} rows in {timeout_s:g} s")

    def _has_room(self, num_bytes: int) -> bool:
        if not self._unsent:
            return True
        total = num_bytes + sum(row.num_bytes for row in self._unsent)
        return len(self._unsent) < self._max_unsent_rows and total <= self._max_unsent_bytes

    def _header_left(self, row: _Row, left: bool) -> None:
        """`Reply.sent`; never waits."""
        with self._changed:
            if row.epoch != self._epoch or self._is_closed:
                return
            if left:
                row.is_announced = True
                self._changed.notify_all()
            else:
                self._give_up(f"the header of row {row.number} could not be sent")

    def _give_up(self, reason: str, next_epoch: int = 0) -> None:
        """The epoch is over, its rows are lost; the lock is held."""
        if self._communicator is not None:
            logger.info("epoch %d of a channel is over: %s", self._epoch, reason)
            # on a thread of its own, as it takes milliseconds: who gives up may be the thread of all HTTP calls
            self._abort = threading.Thread(target=self._communicator.abort, name="abort of a channel", daemon=True)
            self._abort.start()
        self._communicator = None
        self._unsent.clear()
        self._epoch = max(self._epoch + 1, next_epoch)
        self._next_number = 0
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException:  # an error of ours: the session's rows fail, and its client opens another
            logger.exception("the %s sender of a session failed", self._link.kind)
            with self._changed:
                self._is_closed = True
                self._give_up("its thread failed")

    def _step(self) -> bool:
        """One thing that is to be done; False at the end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._is_closed:
                return False
            proposal = self._new_proposal()
            row, communicator = self._unsent[0] if self._unsent else None, self._communicator
        if proposal is not None:
            self._begin(proposal)
        elif row is not None and communicator is not None:
            self._transfer(row, communicator)
        return True

    def _has_work(self) -> bool:
        is_ready = self._communicator is not None and bool(self._unsent) and self._unsent[0].is_announced
        return self._is_closed or is_ready or self._new_proposal() is not None

    def _new_proposal(self) -> Proposal | None:
        proposal = proposed(self._store)
        return None if proposal == self._last_joined else proposal

    def _begin(self, proposal: Proposal) -> None:
        with self._changed:
            self._last_joined = proposal
            if self._tried_epoch == self._epoch or proposal.epoch > self._epoch:
                self._give_up("the client begins another", proposal.epoch)
            epoch = self._tried_epoch = self._epoch
        join(self._store, epoch, proposal)
        try:
            communicator = self._link.connect(epoch, proposal.nonce, self._is_superseded)
        except PacelineError as error:
            with self._changed:
                if not self._is_superseded():
                    logger.warning("epoch %d of a channel could not begin: %s", epoch, error)
                if self._epoch == epoch:
                    self._give_up("it could not begin")
            return
        with self._changed:
            if self._epoch == epoch and not self._is_closed:
                self._communicator = communicator
                return
        communicator.abort()

    def _is_superseded(self) -> bool:
        return self._is_closed or self._new_proposal() is not None

    def _transfer(self, row: _Row, communicator: Communicator) -> None:
        try:
            if row.num_bytes:
                communicator.send(row.buffer.memory[: row.num_bytes], self._link.timeout_s)
        except TransportError as error:
            with self._changed:
                if self._epoch == row.epoch:
                    logger.warning("row %d of epoch %d was lost: %s", row.number, row.epoch, error)
                    self._give_up("a row was lost")
        else:
            with self._changed:
                if self._epoch == row.epoch:
                    self._unsent.popleft()
                    self._changed.notify_all()
        row.buffer.give_back()
