"""Which servers are in the pool: connecting, losing and finding them again, one thread a connection attempt."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from paceline.client.assignments import Link
from paceline.client.checks import check_limits, check_specs, check_target
from paceline.client.closing import Closing
from paceline.client.connection import Connection
from paceline.client.server_list import MakeConnection, ServerList
from paceline.errors import PacelineError, ServerLostError, StoppedError
from paceline.schema.features import FeatureSpec
from paceline.schema.limits import RowSizes
from paceline.schema.target_info import TargetInfo

_LOOK_EVERY_S = 0.5
_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 10.0
_GRACE_S = 2.0
"""At start, once one server is up, the others have so long to show that they are the wrong ones."""
_logger = logging.getLogger(__name__)


class LinkOwner(Protocol):
    """Who asks for rows over links; called without a lock, on threads of the membership."""

    def join(self, link: Link) -> None:
        """A session is open: rows may be asked for."""

    def leave(self, link: Link) -> None:
        """The server was taken from the list; whoever uses it closes it when its rows are in. May precede `join`."""

    def fail(self, error: BaseException) -> None:
        """A bug: it belongs to those who wait for rows."""


@dataclass(slots=True, eq=False)
class _Member:
    """One entry of the server list."""

    name: str
    make: MakeConnection
    state: Literal["down", "connecting", "up", "refused"] = "down"
    """Refused: not what this run expects, and not tried again before its entry changes."""
    retry_at: float = 0.0
    num_failures: int = 0
    """Since a row came from it."""
    down_since: float = 0.0
    error: BaseException | None = None
    """Why it is down or refused."""
    tried: bool = False
    """Whether the first attempt to connect it has ended."""
    opening: Connection | None = None
    link: Link | None = None

    def report(self, now: float) -> str:
        down_s = now - self.down_since
        if self.state == "refused":
            return f"{self.name}: refused {down_s:.0f} s ago: {self.error}"
        reason = self.error if self.error is not None else "it has not answered yet"
        return f"{self.name}: down for {down_s:.0f} s: {reason}"


class Membership:
    """Keeps a session open on every server of the list that can be reached and is the right one.

    consumes: the server list      waits for: its changes, the time to try a server again
    unblocked by: a server lost, close()

    A server that cannot be reached is tried again, after 0.2 s at first and up to 10 s later. One that is not what the
    run expects (another target, a wrong token) ends the start of the run; later on it is left out with an ERROR.
    """

    def __init__(
        self,
        servers: ServerList,
        specs: Mapping[str, FeatureSpec],
        sizes: RowSizes,
        expected: TargetInfo | None,
        group: str | None,
        closing: Closing,
        pool: LinkOwner,
    ) -> None:
        """Begin to connect; `pool` may be called before this returns.

        Args:
            sizes: of all rows that will be asked for.
            expected: the target every server must have; None takes that of the server that answers first.
            group: of the sessions, if they are a sequence-parallel group's.
            closing: of connections that could not be opened.
        """
        self._servers = servers
        self._specs, self._sizes = dict(specs), sizes
        self._info = expected
        self._group = group
        self._closing = closing
        self._pool = pool
        self._changed = threading.Condition()
        """Guards everything below."""
        self._members: dict[str, _Member] = {}
        self._starting = True
        self._fatal: BaseException | None = None
        """At start: a server that is not what the run expects, or a bug."""
        self._closed = False
        self._connecting: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._run, name="pool-servers", daemon=True)
        self._thread.start()

    def wait_for_first(self, timeout_s: float, log_every_s: float) -> TargetInfo:
        """The target's facts, once a server is up; all servers had their chance to prove that they are the right ones.

        Raises:
            HandshakeError, AuthorizationError: a server is not what the run expects.
            ServerLostError: no server was up in time (and each was tried); names the reason of each.
        """
        started = time.monotonic()
        next_log, grace_until = started + log_every_s, None
        while True:
            with self._changed:
                now = time.monotonic()
                if self._fatal is not None:
                    raise self._fatal
                if self._closed:
                    raise StoppedError("the pool was closed before a server was up")
                all_tried = all(member.tried for member in self._members.values())
                if any(member.state == "up" for member in self._members.values()):
                    grace_until = grace_until or now + _GRACE_S
                    if all_tried or now >= grace_until:
                        self._starting = False
                        assert self._info is not None, "a server is up only if its target was compared"
                        return self._info
                late = now >= started + timeout_s and all_tried and grace_until is None
                if not late:
                    self._changed.wait(0.1)
            if late or now >= next_log:
                text = f"no server is up after {now - started:.0f} s:\n{self.report()}"
                if late:
                    raise ServerLostError(text)
                _logger.warning("%s", text)
                next_log = now + log_every_s

    def lost(self, link: Link, error: BaseException) -> None:
        """`link` is of no use any more: its server is connected anew."""
        with self._changed:
            member = self._members.get(link.name)
            if member is not None and member.link is link:
                self._mark_down(member, error)

    def proved(self, link: Link) -> None:
        """A row came from it: should it be lost, it is tried again soon."""
        member = self._members.get(link.name)
        if member is not None:
            member.num_failures = 0

    def report(self) -> str:
        """A line for each server that is not up: what is wrong with it, for how long."""
        with self._changed:
            now = time.monotonic()
            lines = [f"  {member.report(now)}" for member in self._members.values() if member.state != "up"]
        return "\n".join(lines) if lines else "  no server is listed"

    def close(self) -> list[threading.Thread]:
        """Connect nothing any more; the threads that will end by themselves, soon. Safe to call twice."""
        with self._changed:
            self._closed = True
            opening = [(member.name, member.opening) for member in self._members.values()]
            self._members.clear()
            self._changed.notify_all()
            threads = [self._thread, *self._connecting]
        for name, connection in opening:
            if connection is not None:
                self._closing.close(name, connection, abort=True)
        return threads

    def _run(self) -> None:
        try:
            while self._look():
                pass
        except BaseException as error:
            self._broken(error)

    def _look(self) -> bool:
        """Bring members in line with the list, connect what is due, wait; False after `close`."""
        listed = self._servers.read()
        with self._changed:
            if self._closed:
                return False
            gone = [self._members.pop(name) for name in [*self._members] if name not in listed]
            for name, make in listed.items():
                self._take_in(name, make)
        for member in gone:
            _logger.info("%s was taken from the list of servers", member.name)
            if member.link is not None:
                self._pool.leave(member.link)
        with self._changed:
            now = time.monotonic()
            due = [member for member in self._members.values() if member.state == "down" and member.retry_at <= now]
            for member in due:
                self._start_connecting(member)
            later = [member.retry_at - now for member in self._members.values() if member.state == "down"]
            if not self._closed:
                self._changed.wait(min(_LOOK_EVERY_S, *later, _LOOK_EVERY_S))
        return True

    def _take_in(self, name: str, make: MakeConnection) -> None:
        member = self._members.get(name)
        if member is None:
            self._members[name] = _Member(name, make, down_since=time.monotonic())
        elif member.make is not make:
            member.make = make
            if member.state in ("down", "refused"):
                member.state, member.retry_at, member.num_failures = "down", 0.0, 0

    def _start_connecting(self, member: _Member) -> None:
        member.state = "connecting"
        thread = threading.Thread(
            target=self._connect, args=(member, member.make), name=f"connect {member.name}", daemon=True
        )
        self._connecting = {other for other in self._connecting if other.is_alive()} | {thread}
        thread.start()

    def _connect(self, member: _Member, make: MakeConnection) -> None:
        """Open a session on one server; on a thread of its own, so that a server that hangs holds up no other."""
        try:
            connection = make()
            if not self._set_opening(member, connection):
                return
            try:
                self._open(member.name, connection)
            except BaseException:
                self._closing.close(member.name, connection)
                raise
            self._bring_in(member, Link(member.name, connection))
        except PacelineError as error:
            self._note_failure(member, make, error)
        except BaseException as error:
            self._broken(error)

    def _set_opening(self, member: _Member, connection: Connection) -> bool:
        with self._changed:
            wanted = self._members.get(member.name) is member
            member.opening = connection if wanted else None
        if not wanted:
            self._closing.close(member.name, connection)
        return wanted

    def _open(self, name: str, connection: Connection) -> None:
        info = connection.info()
        check_specs(name, info, self._specs)
        with self._changed:
            self._info = self._info or info
            expected = self._info
        check_target(name, info, expected)
        check_limits(name, connection.limits(), self._specs, self._sizes)
        connection.open_session(self._specs, self._group)

    def _bring_in(self, member: _Member, link: Link) -> None:
        with self._changed:
            member.opening = None
            wanted = self._members.get(member.name) is member
            if wanted:
                member.link = link
        if not wanted:
            self._closing.close(link.name, link.connection)
            return
        self._pool.join(link)
        with self._changed:
            if member.link is link:  # not lost again meanwhile
                member.state, member.tried, member.error = "up", True, None
                num_up = sum(other.state == "up" for other in self._members.values())
                _logger.info("%s is up (%d of %d servers)", member.name, num_up, len(self._members))
            self._changed.notify_all()

    def _note_failure(self, member: _Member, make: MakeConnection, error: PacelineError) -> None:
        with self._changed:
            if self._closed or self._members.get(member.name) is not member:
                return
            if not error.retryable and member.make is make:
                member.state, member.error, member.tried, member.opening = "refused", error, True, None
                member.down_since = time.monotonic()
                if self._starting:
                    self._fatal = self._fatal or error
                else:
                    _logger.error("%s is left out: %s", member.name, error)
                self._changed.notify_all()
            else:
                level = logging.DEBUG if member.num_failures else logging.WARNING
                _logger.log(level, "%s cannot be used, it is tried again: %s", member.name, error)
                self._mark_down(member, error)

    def _mark_down(self, member: _Member, error: BaseException) -> None:
        now = time.monotonic()
        if member.link is not None:
            member.down_since = now
        backoff_s = min(_FIRST_BACKOFF_S * 2.0 ** min(member.num_failures, 30), _LONGEST_BACKOFF_S)
        member.retry_at = now + backoff_s * random.uniform(0.5, 1.0)
        member.num_failures += 1
        member.state, member.error, member.tried, member.opening, member.link = "down", error, True, None, None
        self._changed.notify_all()

    def _broken(self, error: BaseException) -> None:
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()
        self._pool.fail(error)
