"""All sessions of a server: opened, renewed, ended by their clients, or by their leases."""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paceline.errors import ConfigError, PacelineError, ServerBusyError, SessionLostError, StoppedError
from paceline.schema.protocol import (
    PROTOCOL_VERSION,
    HostFacts,
    SessionReply,
    SessionRequest,
    TransportName,
)
from paceline.schema.target_info import TargetInfo
from paceline.target.server.answers import Refusal
from paceline.target.server.session import EngineSide, Session
from paceline.transport.negotiation import OpenedSender, OpenSender, SenderRequest, TransportRefused

logger = logging.getLogger(__name__)

_LONGEST_LOOK_S = 1.0
_END_S = 2.0
"""All sessions get so long to end in order when the server does."""


@dataclass(slots=True, eq=False)
class _Lease:
    session: Session
    lease_s: float
    ends: float


class Sessions:
    """Sessions by id. A thread of its own ends those whose lease ran out.

    consumes: calls of HTTP threads      waits for: the next lease to end
    unblocked by: time, close()
    """

    def __init__(
        self,
        server_id: str,
        host: HostFacts,
        senders: Mapping[TransportName, OpenSender],
        engine: EngineSide,
        seconds_per_row: Callable[[], float],
    ) -> None:
        """`seconds_per_row` of recent rows says when a full server has room again."""
        self._server_id = server_id
        self._host = host
        self._senders = senders
        self._engine = engine
        self._seconds_per_row = seconds_per_row
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._num_opening = 0
        self._last_use = time.monotonic()
        self._ended = threading.Event()
        self._reaper = threading.Thread(target=self._reap, name="leases", daemon=True)
        self._reaper.start()

    def open(self, asked: SessionRequest) -> SessionReply:
        """Open a session by the first offer that works.

        Raises:
            Refusal: handshake, with both sides named; or busy.
        """
        check_handshake(asked, self._engine.admission.info())
        with self._lock:
            if self._ended.is_set():
                raise Refusal("stopping", "this server is stopping")
            limit = self._engine.settings.max_sessions
            if len(self._leases) + self._num_opening >= limit:
                raise ServerBusyError(f"{len(self._leases)} sessions are open, {limit} are allowed")
            self._num_opening += 1
        session_id, key = secrets.token_hex(16), secrets.token_hex(32)
        try:
            name, opened, refused = self._open_sender(asked, session_id)
            specs = {name: message.spec() for name, message in asked.specs.items()}
            try:
                session = Session(asked.label, key, specs, opened, self._engine, asked.group)
            except PacelineError as error:
                opened.sender.close()
                raise Refusal("handshake", str(error)) if isinstance(error, ConfigError) else error from error
            lease_s = min(asked.lease_s, self._engine.settings.max_lease_s)
            with self._lock:
                self._leases[session_id] = _Lease(session, lease_s, time.monotonic() + lease_s)
        finally:
            with self._lock:
                self._num_opening -= 1
                self._last_use = time.monotonic()
        if self._ended.is_set():
            self.end(session_id, StoppedError("this server is stopping"))
        logger.info("session %s opened for %r by %s, lease %g s", session_id[:8], asked.label, name, lease_s)
        return SessionReply(
            session=session_id,
            key=key,
            lease_s=lease_s,
            server_id=self._server_id,
            transport=name,
            parameters=dict(opened.parameters),
            refused=refused,
        )

    def use(self, session_id: str, key: str | None) -> Session:
        """The session, its lease renewed.

        Raises:
            Refusal: unknown (any more), or another client's.
        """
        with self._lock:
            lease = self._leases.get(session_id)
            if lease is None:
                raise Refusal("unknown_session", "no such session: it has ended, or was another server's; open another")
            if not hmac.compare_digest(lease.session.key.encode(), (key or "").encode(errors="replace")):
                raise Refusal("unauthorized", "this session's key is another one", status=403)
            lease.ends = time.monotonic() + lease.lease_s
        return lease.session

    def end(self, session_id: str, reason: PacelineError | None = None) -> None:
        """End a session; does nothing where there is none."""
        with self._lock:
            lease = self._leases.pop(session_id, None)
            self._last_use = time.monotonic()
        if lease is not None:
            reason = reason or SessionLostError("the session was ended by its client")
            logger.info("session %s of %r ended: %s", session_id[:8], lease.session.label, reason)
            lease.session.close(reason)

    def close(self, reason: PacelineError) -> None:
        """End all sessions and take no more. Safe to call twice."""
        self._ended.set()
        # side by side: to close a channel may take its peer's time
        ends = [
            threading.Thread(target=self.end, args=(session_id, reason), name="session end", daemon=True)
            for session_id in list(self._leases)
        ]
        for thread in ends:
            thread.start()
        deadline = time.monotonic() + _END_S
        for thread in ends:
            thread.join(max(0.0, deadline - time.monotonic()))

    def count(self) -> int:
        """Sessions open now."""
        return len(self._leases)

    def num_waiting(self) -> int:
        """Rows of all sessions that wait for a place with the engine."""
        with self._lock:
            return sum(lease.session.num_waiting() for lease in self._leases.values())

    def idle_s(self) -> float:
        """Seconds since the last session ended, or since the start; 0 while there is one."""
        with self._lock:
            return 0.0 if self._leases or self._num_opening else time.monotonic() - self._last_use

    def retry_after_s(self) -> int:
        """When a place in a full queue becomes free: each session with rows waiting has its turn in between."""
        with self._lock:
            taking_turns = sum(lease.session.num_waiting() > 0 for lease in self._leases.values())
        return max(1, math.ceil(self._seconds_per_row() * taking_turns))

    def _open_sender(
        self, asked: SessionRequest, session_id: str
    ) -> tuple[TransportName, OpenedSender, dict[str, str]]:
        refused: dict[str, str] = {}
        for offer in asked.offers:
            open_sender = self._senders.get(offer.name)
            if open_sender is None:
                refused[offer.name] = f"this server sends by {', '.join(self._senders)} only"
                continue
            request = SenderRequest(offer.parameters, asked.client, self._host, session_id, self._engine.device)
            try:
                return offer.name, open_sender(request), refused
            except TransportRefused as reason:
                refused[offer.name] = str(reason)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise Refusal("handshake", f"no transport that the client offers works here: {reasons}")

    def _reap(self) -> None:
        while not self._ended.wait(self._next_look_s()):
            now = time.monotonic()
            for session_id, lease in list(self._leases.items()):
                if lease.ends <= now:
                    self.end(session_id, SessionLostError(f"its lease of {lease.lease_s:g} s ran out"))
            self._engine.groups.drop_stale()

    def _next_look_s(self) -> float:
        with self._lock:
            first = min((lease.ends for lease in self._leases.values()), default=math.inf)
        return min(_LONGEST_LOOK_S, max(0.01, first - time.monotonic()))


def check_handshake(asked: SessionRequest, info: TargetInfo) -> None:
    """Refuse a client that speaks another protocol or expects another target; names what each side has.

    `name` may differ: it is a path or hub id, and servers of one pool may have copies in different places.
    """
    if asked.protocol != PROTOCOL_VERSION:
        raise protocol_refusal(asked.protocol)
    if asked.target is None:
        return
    here, there = info.model_dump(), asked.target.model_dump()
    differing = [
        f"{field}: the server has {here[field]!r}, the client expects {there[field]!r}"
        for field in here
        if field != "name" and here[field] != there[field]
    ]
    if differing:
        raise Refusal(
            "handshake",
            f"another target: the server serves {info.name}, the client expects {asked.target.name}; "
            + "; ".join(differing),
        )


def protocol_refusal(theirs: int) -> Refusal:
    """For a client of another protocol version."""
    return Refusal(
        "handshake",
        f"the server speaks protocol {PROTOCOL_VERSION}, the client protocol {theirs}: "
        "install the same version of paceline on both sides",
    )
