"""One session: its rows on their way from the request to the reply, bounded, and the thread that sends them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from paceline.errors import PacelineError, ServerBusyError, SessionLostError, TransportError, WireError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import reply_bytes
from paceline.schema.parts import WHOLE, requested_part
from paceline.schema.rows import RowRequest
from paceline.target.admission import Admission
from paceline.target.groups import RowGroups
from paceline.target.server.settings import ServerSettings
from paceline.transport.base import Reply
from paceline.transport.negotiation import OpenedSender

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RowWork:
    """One row asked for. Its `reply` is set once; whoever gets it calls `finish`."""

    request: RowRequest
    num_bytes: int
    """Of features."""
    leave: Callable[[RowWork], None]
    """Frees its place in the session; called once."""
    reply: Future[Reply] = field(default_factory=Future)
    captured: Future[Features] | None = None
    """In admission; None while it waits for its place there."""
    features: Features | None = None
    """Computed, and not yet handed to the sender."""
    computed_at: float = 0.0
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_over(self) -> bool:
        """Whether somebody has answered it, or nobody waits for it."""
        return self._over

    def answer(self, reply: Reply) -> bool:
        """Whether somebody still waits for the reply and now has it."""
        if not self._end():
            return False
        self.reply.set_result(reply)
        return True

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits that there will be no reply."""
        if self._end():
            self.reply.set_exception(error)

    def abandon(self) -> None:
        """Nobody waits any more; a row that is not in the engine yet never gets there."""
        if not self._end() and self.reply.exception() is None:
            self.finish(self.reply.result(), sent=False)
        captured = self.captured
        if captured is not None:
            captured.cancel()

    def finish(self, reply: Reply, sent: bool) -> None:
        """The reply has left, or could not."""
        try:
            reply.sent(sent)
        finally:
            self.leave(self)

    def _end(self) -> bool:
        with self._lock:
            first, self._over = not self._over, True
        return first


@dataclass(frozen=True, slots=True)
class EngineSide:
    """What a session needs of the engine's side."""

    admission: Admission
    groups: RowGroups
    device: torch.device
    settings: ServerSettings
    on_captured: Callable[[Future[Features]], None]
    """The engine is done with a row, or it was cancelled; once a row, on any thread."""
    on_failed: Callable[[BaseException], None]
    """A row could not be handed to the engine; any thread."""


class Turns(Protocol):
    """What takes a session's rows to the engine."""

    def submit(self, request: RowRequest) -> Future[Features]:
        """Features of the whole row, also where a part is asked for."""

    def close(self) -> None:
        """Rows that wait fail, or are cancelled where others wait for them too. Safe to call twice."""


class OwnTurns:
    """For a session of no group: whole rows, each computed for it alone."""

    def __init__(self, engine: EngineSide, specs: Mapping[str, FeatureSpec]) -> None:
        """Raises as Admission.open_session."""
        self._engine = engine
        self._session = engine.admission.open_session(specs)
        self._closed = False

    def submit(self, request: RowRequest) -> Future[Features]:
        if request.part != WHOLE:
            raise WireError(
                f"row {request.position} is asked for in {request.part.count} parts by a session of no group: only a "
                "session that was opened with one may"
            )
        captured = self._engine.admission.submit(self._session, request)
        captured.add_done_callback(self._on_captured)
        return captured

    def close(self) -> None:
        self._closed = True
        self._engine.admission.close_session(self._session)

    def _on_captured(self, captured: Future[Features]) -> None:
        if self._closed and not captured.cancelled() and captured.exception() is not None:
            return  # no failure of the engine
        self._engine.on_captured(captured)


class Session:
    """A client's rows, in order.

    consumes: requests of HTTP threads      waits for: the engine, on the engine's thread; the sender, on its own
    unblocked by: features, the client leaving, close()

    Requests wait here as tokens. As many as the settings' `max_unsent_...` allow are with the engine or on their
    way out; a row counts until its reply has left.
    """

    def __init__(
        self,
        label: str,
        key: str,
        specs: dict[str, FeatureSpec],
        opened: OpenedSender,
        engine: EngineSide,
        group: str | None = None,
    ) -> None:
        """Register with admission, or with the sessions of its `group`, and start the sending thread.

        Raises:
            ConfigError: a capture layer that the target does not have, or other specs than the group's.
            ServerBusyError: admission has no room for another session.
        """
        self.label = label
        self.key = key
        self.opened = opened
        self._specs = specs
        self._engine = engine
        self._turns: Turns = OwnTurns(engine, specs) if group is None else engine.groups.join(group, specs)
        self._lock = threading.RLock()
        self._waiting: deque[RowWork] = deque()
        self._unsent: set[RowWork] = set()
        self._unsent_bytes = 0
        self._closed: BaseException | None = None
        self._computed: queue.SimpleQueue[RowWork | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_rows, name="session sender", daemon=True)
        self._thread.start()

    def submit(self, request: RowRequest) -> RowWork:
        """The work of a new row.

        Raises:
            WireError: the session registered no such spec.
            ServerBusyError: `max_queued_rows` are waiting.
            SessionLostError: the session has ended.
        """
        spec = self._specs.get(request.spec)
        if spec is None:
            raise WireError(
                f"row {request.position} asks for features {request.spec!r}, this session registered "
                f"{', '.join(sorted(self._specs))}"
            )
        # also for a part: it is a view of the whole row until it has left
        num_bytes = max(0, reply_bytes(request, spec, self._engine.admission.info()))
        work = RowWork(request, num_bytes, self._leave)
        limit = self._engine.settings.max_queued_rows
        with self._lock:
            if self._closed is not None:
                raise SessionLostError(f"the session has ended: {self._closed}")
            if len(self._waiting) >= limit:
                raise ServerBusyError(f"{len(self._waiting)} rows of this session are waiting, {limit} are allowed")
            self._waiting.append(work)
            self._hand_over()
        return work

    def abandon(self, work: RowWork) -> None:
        """Nobody waits for this row any more."""
        work.abandon()
        with self._lock:
            if work in self._waiting:
                self._waiting.remove(work)

    def num_waiting(self) -> int:
        """Rows that wait for a place with the engine."""
        return len(self._waiting)

    def close(self, reason: PacelineError) -> None:
        """End; rows that are not on their way out fail with `reason`. Safe to call twice, from any thread."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = reason
            rows = [*self._waiting, *self._unsent]
            self._waiting.clear()
        for work in rows:
            work.fail(reason)
        self._turns.close()
        self._computed.put(None)
        self.opened.sender.close()

    def _hand_over(self) -> None:
        """Submit what may be with the engine; the lock is held."""
        while self._waiting and self._closed is None and self._has_room(self._waiting[0]):
            work = self._waiting.popleft()
            if work.is_over:
                continue
            self._unsent.add(work)
            self._unsent_bytes += work.num_bytes
            try:
                captured = work.captured = self._turns.submit(work.request)
            except PacelineError as error:
                self._engine.on_failed(error)
                work.fail(error)
                self._leave(work)
            else:
                captured.add_done_callback(partial(self._on_captured, work))

    def _has_room(self, work: RowWork) -> bool:
        if not self._unsent:
            return True
        settings = self._engine.settings
        num_tokens = sum(len(each.request.tokens) for each in (work, *self._unsent))
        most = settings.most_unsent_rows if num_tokens <= settings.max_unsent_tokens else settings.max_unsent_rows
        return len(self._unsent) < most and self._unsent_bytes + work.num_bytes <= settings.max_unsent_bytes

    def _on_captured(self, work: RowWork, captured: Future[Features]) -> None:
        """The engine, or whoever cancelled the row, is done with it."""
        work.captured = None  # it knows this work and the features: together they would outlive the reply
        try:
            features = captured.result()
        except CancelledError:
            self._leave(work)
            return
        except BaseException as error:  # handed to who waits for the row
            work.fail(error)
            self._leave(work)
            return
        if work.is_over or self._closed is not None:
            self._leave(work)
            return
        work.features, work.computed_at = features, time.monotonic()
        self._computed.put(work)

    def _leave(self, work: RowWork) -> None:
        with self._lock:
            if work in self._unsent:
                self._unsent.remove(work)
                self._unsent_bytes -= work.num_bytes
            self._hand_over()

    def _send_rows(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.set_device(self._engine.device)
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        """Send one row, and keep nothing of it; False at the end."""
        work = self._computed.get()
        if work is None:
            return False
        try:
            self._send(work)
        except TransportError as error:
            logger.warning("row %d of %r could not be sent: %s", work.request.position, self.label, error)
            work.fail(error)
            self._leave(work)
        except BaseException as error:
            # the channel is in no known state; the client opens another session
            logger.exception("the sender of session %r failed on row %d", self.label, work.request.position)
            work.fail(error)
            self.close(SessionLostError(f"the session's sender failed: {type(error).__name__}"))
            return False
        return True

    def _send(self, work: RowWork) -> None:
        features, work.features = work.features, None
        assert features is not None
        if work.is_over:
            self._leave(work)
            return
        request = work.request
        part = requested_part(request, self._specs[request.spec], features)
        if part is not features:
            part.computed_s /= request.part.count  # so that the parts of a row add up to its time
        reply = self.opened.sender.send(request.position, part)
        if not work.answer(reply):
            work.finish(reply, sent=False)
