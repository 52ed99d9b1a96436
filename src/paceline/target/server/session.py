"""One session: its rows on their way from the request to the reply, bounded, and the thread that sends them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial

import torch

from paceline.errors import PacelineError, ServerBusyError, SessionLostError, TransportError, WireError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import reply_bytes
from paceline.schema.rows import RowRequest
from paceline.target.admission import Admission
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
    device: torch.device
    settings: ServerSettings
    on_computed: Callable[[Features], None]
    """A row was computed; on the engine's thread."""
    on_failed: Callable[[BaseException], None]
    """A row failed in the engine; any thread."""


class Session:
    """A client's rows, in order.

    consumes: requests of HTTP threads      waits for: the engine, on the engine's thread; the sender, on its own
    unblocked by: features, the client leaving, close()

    Requests wait here as tokens. At most `max_unsent_rows` (and `max_unsent_bytes`) are with the engine or on their
    way out; a row counts until its reply has left.
    """

    def __init__(
        self, label: str, key: str, specs: dict[str, FeatureSpec], opened: OpenedSender, engine: EngineSide
    ) -> None:
        """Register with admission and start the sending thread.

        Raises:
            ConfigError: a capture layer that the target does not have.
            ServerBusyError: admission has no room for another session.
        """
        self.label = label
        self.key = key
        self.opened = opened
        self._specs = specs
        self._engine = engine
        self._admission_id = engine.admission.open_session(specs)
        self._lock = threading.RLock()
        self._waiting: deque[RowWork] = deque()
        self._unsent: set[RowWork] = set()
        self._unsent_bytes = 0
        self._closed: BaseException | None = None
        # No more than the unsent rows and the end can be in it.
        self._computed: queue.Queue[RowWork | None] = queue.Queue(engine.settings.max_unsent_rows + 1)
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
        self._engine.admission.close_session(self._admission_id)
        self._computed.put(None)
        self.opened.sender.close()

    def _hand_over(self) -> None:
        """Submit what may be with the engine; the lock is held."""
        settings = self._engine.settings
        while self._waiting and self._closed is None and len(self._unsent) < settings.max_unsent_rows:
            work = self._waiting[0]
            if self._unsent and self._unsent_bytes + work.num_bytes > settings.max_unsent_bytes:
                return
            self._waiting.popleft()
            if work.is_over:
                continue
            self._unsent.add(work)
            self._unsent_bytes += work.num_bytes
            try:
                captured = work.captured = self._engine.admission.submit(self._admission_id, work.request)
            except PacelineError as error:
                self._engine.on_failed(error)
                work.fail(error)
                self._leave(work)
            else:
                captured.add_done_callback(partial(self._on_captured, work))

    def _on_captured(self, work: RowWork, captured: Future[Features]) -> None:
        """The engine, or whoever cancelled the row, is done with it."""
        work.captured = None  # it knows this work and the features: together they would outlive the reply
        try:
            features = captured.result()
        except CancelledError:
            self._leave(work)
            return
        except BaseException as error:  # handed to who waits for the row
            if self._closed is None:
                self._engine.on_failed(error)
            work.fail(error)
            self._leave(work)
            return
        self._engine.on_computed(features)
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
        reply = self.opened.sender.send(work.request.position, features)
        if not work.answer(reply):
            work.finish(reply, sent=False)
