"""Admission: rows of several sessions, taken in turn and handed to one engine."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from paceline.errors import ConfigError, PacelineError, ServerBusyError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.interface import Engine

_SHORTEST_RECHECK_S = 0.0005
_LONGEST_RECHECK_S = 0.05
_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiting:
    request: RowRequest
    spec: FeatureSpec
    answer: Future[Features]
    since: float


@dataclass(slots=True, eq=False)
class _Session:
    specs: Mapping[str, FeatureSpec]
    max_queued_rows: int
    rows: deque[_Waiting] = field(default_factory=deque)


class Admission:
    """Rows of all sessions, one session after the other, in order within each.

    consumes: rows of any thread      waits for: room in the engine
    unblocked by: a new row, a row that is done, close()

    One thread of its own is the only one that calls `engine.capture` and `engine.room`, and holds no lock meanwhile.
    """

    def __init__(self, engine: Engine, max_queued_rows: int = 64, max_sessions: int = 64) -> None:
        """Serve `engine`, which stays its builder's to close (after this).

        Args:
            max_queued_rows: rows one session may have waiting here; the bound is each session's own, so that a deep
                look-ahead of one is never the reason to refuse another.
            max_sessions: sessions open at one time.
        """
        self._engine = engine
        self._max_queued_rows = max_queued_rows
        self._max_sessions = max_sessions
        self._changed = threading.Condition()
        self._sessions: dict[str, _Session] = {}
        self._turns: deque[str] = deque()
        """Sessions with rows waiting, the next one first."""
        self._session_ids = itertools.count()
        self._row_done = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="admission", daemon=True)
        self._thread.start()

    def info(self) -> TargetInfo:
        """The engine's facts about its target."""
        return self._engine.info()

    def limits(self) -> Limits:
        """What the engine takes."""
        return self._engine.limits()

    def open_session(self, specs: Mapping[str, FeatureSpec], max_queued_rows: int | None = None) -> str:
        """The id of a new session that may ask for the named `specs`.

        Args:
            max_queued_rows: of this session; None is what all have.

        Raises:
            ConfigError: a capture layer that the target does not have, or the engine was not started for.
            ServerBusyError: `max_sessions` are open.
            StoppedError: after `close`.
        """
        num_layers, started_for = self._engine.info().num_layers, self._engine.limits().layers
        for name, spec in specs.items():
            missing = [layer for layer in spec.layers if not 0 <= layer < num_layers]
            if missing:
                raise ConfigError(
                    f"features {name!r} ask for capture layers {missing}, {self._engine.info().name} has "
                    f"0..{num_layers - 1}: correct drafts.NAME.target_layers"
                )
            missing = [] if started_for is None else sorted(set(spec.layers) - set(started_for))
            if missing:
                raise ConfigError(
                    f"features {name!r} ask for capture layers {missing}, {self._engine.info().name} is served by an "
                    f"engine that was started for {list(started_for or ())}: start it for all of them "
                    "(target.capture_layers)"
                )
        with self._changed:
            self._check_open()
            if len(self._sessions) >= self._max_sessions:
                raise ServerBusyError(f"{len(self._sessions)} sessions are open, {self._max_sessions} are allowed")
            session = f"session-{next(self._session_ids)}"
            self._sessions[session] = _Session(dict(specs), max_queued_rows or self._max_queued_rows)
        return session

    def submit(self, session: str, request: RowRequest) -> Future[Features]:
        """Features of one row, when its turn has come and the engine is done.

        `queued_s` of the answer is the time from this call to the engine's, on top of the engine's own. A row whose
        future is cancelled while it waits never reaches the engine.

        Raises:
            ConfigError: the session has registered no such spec.
            ServerBusyError: `max_queued_rows` of this session are waiting.
            StoppedError: the session, or admission, is closed.
        """
        with self._changed:
            self._check_open()
            if session not in self._sessions:
                raise StoppedError(f"{session} is closed: row {request.position} is not taken")
            state = self._sessions[session]
            if request.spec not in state.specs:
                known = ", ".join(sorted(state.specs))
                raise ConfigError(
                    f"row {request.position} asks for features {request.spec!r}, {session} registered {known}"
                )
            if len(state.rows) >= state.max_queued_rows:
                raise ServerBusyError(
                    f"{len(state.rows)} rows of {session} are waiting, {state.max_queued_rows} are allowed"
                )
            waiting = _Waiting(request, state.specs[request.spec], Future(), time.monotonic())
            if not state.rows:
                self._turns.append(session)
            state.rows.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def close_session(self, session: str) -> None:
        """End a session; its waiting rows fail with StoppedError, those in the engine are answered. Idempotent."""
        with self._changed:
            state = self._sessions.pop(session, None)
            if session in self._turns:
                self._turns.remove(session)
        if state is not None:
            _fail(state.rows, StoppedError(f"{session} was closed"))

    def close(self) -> None:
        """End; rows that wait fail with StoppedError, those in the engine are the engine's to answer. Idempotent."""
        self._end(StoppedError("admission was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def num_queued_rows(self) -> int:
        """Rows waiting, over all sessions."""
        with self._changed:
            return sum(len(state.rows) for state in self._sessions.values())

    def _check_open(self) -> None:
        if self._ended is not None:
            raise StoppedError("the target's admission has ended") from self._ended

    def _end(self, reason: BaseException) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = reason
            sessions, self._sessions = self._sessions, {}
            self._turns.clear()
            self._changed.notify_all()
        self._row_done.set()
        for state in sessions.values():
            _fail(state.rows, reason)

    def _serve(self) -> None:
        try:
            while self._wait_for_rows():
                self._wait_for_room()
                self._hand_over_next()
        except BaseException as error:
            # whatever ends this thread belongs to those who wait for its rows
            _logger.critical("admission ended: %s", error)
            self._end(error)
            raise

    def _wait_for_rows(self) -> bool:
        with self._changed:
            while not self._turns and self._ended is None:
                self._changed.wait()
            return self._ended is None

    def _wait_for_room(self) -> None:
        """Return when the engine has room, or admission has ended.

        An engine may count a row out a moment after it resolved it, so a finished row is a reason to look again, soon
        and then less and less often.
        """
        pause_s = _SHORTEST_RECHECK_S
        while self._ended is None and self._engine.room() <= 0:
            if self._row_done.wait(pause_s):
                self._row_done.clear()
                pause_s = _SHORTEST_RECHECK_S
            else:
                pause_s = min(2 * pause_s, _LONGEST_RECHECK_S)

    def _take_next(self) -> _Waiting | None:
        with self._changed:
            if not self._turns:
                return None
            session = self._turns.popleft()
            rows = self._sessions[session].rows
            waiting = rows.popleft()
            if rows:
                self._turns.append(session)
        return waiting if waiting.answer.set_running_or_notify_cancel() else None

    def _hand_over_next(self) -> None:
        """A function, so that no local keeps a row's features until the next row comes."""
        waiting = self._take_next()
        if waiting is not None:
            self._hand_over(waiting)

    def _hand_over(self, waiting: _Waiting) -> None:
        queued_s = time.monotonic() - waiting.since

        def answer(captured: Future[Features]) -> None:
            self._row_done.set()
            if captured.cancelled():
                waiting.answer.set_exception(
                    StoppedError(f"row {waiting.request.position} was cancelled in the engine")
                )
                return
            error = captured.exception()
            if error is not None:
                waiting.answer.set_exception(error)
            else:
                features = captured.result()
                features.queued_s += queued_s
                waiting.answer.set_result(features)

        try:
            captured = self._engine.capture(waiting.request, waiting.spec)
        except PacelineError as error:
            waiting.answer.set_exception(error)
            return
        except BaseException as error:
            waiting.answer.set_exception(error)
            raise
        captured.add_done_callback(answer)


def _fail(rows: deque[_Waiting], reason: BaseException) -> None:
    for waiting in rows:
        if waiting.answer.set_running_or_notify_cancel():
            waiting.answer.set_exception(reason)
