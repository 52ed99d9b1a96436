"""Rows of sequence-parallel groups: asked for by every rank of a group, computed once, kept until each had its part."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from paceline.errors import ConfigError, StoppedError, WireError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.parts import WHOLE
from paceline.schema.rows import RowRequest
from paceline.target.admission import Admission

_MAX_DROPPED = 1024
"""Remembered of one group."""
RowKey = tuple[int, str, int]
"""Position, hash, and number of parts. The spec's name is in the hash, and members of a group register equal specs."""


@dataclass(frozen=True, slots=True)
class KeptBounds:
    """Of rows that were computed and that some member of their group has not asked for yet, over all groups."""

    num_rows: int = 64
    num_bytes: int = 8 << 30
    """A larger row is kept alone."""
    seconds: float = 60.0


@dataclass(slots=True, eq=False)
class _Waiter:
    member: GroupMember
    part: int
    answer: Future[Features]


@dataclass(slots=True, eq=False)
class _Row:
    num_parts: int
    captured: Future[Features] | None
    """Of admission; None once it is done: together they would outlive the row."""
    waiters: list[_Waiter] = field(default_factory=list)
    features: Features | None = None
    """Kept for who comes later."""
    kept_until: float = math.inf
    taken: set[int] = field(default_factory=set)
    """Parts that somebody was given."""

    @property
    def num_kept_bytes(self) -> int:
        return self.features.num_bytes if self.features is not None else 0


@dataclass(slots=True, eq=False)
class _Group:
    specs: Mapping[str, FeatureSpec]
    session: str
    """Admission's, one for the whole group: it takes one turn, however many ranks it has."""
    num_parts: int | None = None
    """As the first part that was asked for said; whole rows may be asked for besides."""
    members: set[GroupMember] = field(default_factory=set)
    rows: dict[RowKey, _Row] = field(default_factory=dict)
    """Being computed, or kept; the one asked for first is the first."""
    dropped: dict[RowKey, set[int]] = field(default_factory=dict)
    """Parts taken of rows that were not kept for the others. A row computed anew for one of these is not kept for who
    had his part: it would push out the next rows, and they those behind them."""

    @property
    def num_kept_bytes(self) -> int:
        return sum(row.num_kept_bytes for row in self.rows.values())


class RowGroups:
    """Groups by their secrets; a group lives as long as one of its sessions.

    Whoever asks for a part of a row first has it computed. Others of the group who ask meanwhile wait for the same
    features and take no place of their own in any queue; those who come later get what is kept. Each gets the features
    of the whole row, to cut its part out of. What is kept beyond `bounds`, or after all parts were given out, is
    dropped: a part that is asked for again is computed again.

    Thread-safe. No answer is given while the lock is held.
    """

    def __init__(
        self,
        admission: Admission,
        bounds: KeptBounds,
        max_queued_rows: int,
        on_captured: Callable[[Future[Features]], None],
    ) -> None:
        """No groups yet.

        Args:
            max_queued_rows: rows of one group that may wait in admission: as many as all sessions together may have
                there, so that no member is refused because of what the others asked for.
            on_captured: told of every row that the engine is done with, or that was cancelled, once.
        """
        self._admission = admission
        self._bounds = bounds
        self._max_queued_rows = max_queued_rows
        self._on_captured = on_captured
        self._lock = threading.RLock()
        """Guards the groups and all in them; taken before admission's. Cancelling calls back with it held."""
        self._groups: dict[str, _Group] = {}

    def join(self, key: str, specs: Mapping[str, FeatureSpec]) -> GroupMember:
        """A session of the group of this secret; the first member makes it.

        Raises:
            ConfigError: a capture layer that the target does not have, or other specs than the group's.
            ServerBusyError: admission has no room for another session.
        """
        with self._lock:
            group = self._groups.get(key)
            if group is None:
                session = self._admission.open_session(specs, self._max_queued_rows)
                group = self._groups[key] = _Group(dict(specs), session)
            elif group.specs != dict(specs):
                raise ConfigError(
                    f"the group asks for features {dict(group.specs)}, this session of it for {dict(specs)}: all ranks "
                    "of a group register the same"
                )
            member = GroupMember(self, key, group)
            group.members.add(member)
        return member

    def num_kept_rows(self) -> int:
        """Rows kept for members that have not asked for them yet."""
        with self._lock:
            return sum(row.features is not None for group in self._groups.values() for row in group.rows.values())

    def num_kept_bytes(self) -> int:
        """Of these rows."""
        with self._lock:
            return sum(group.num_kept_bytes for group in self._groups.values())

    def drop_stale(self) -> None:
        """Forget rows that were kept for long enough; to be called now and then."""
        now = time.monotonic()
        with self._lock:
            for group in self._groups.values():
                for key in [key for key, row in group.rows.items() if row.kept_until <= now]:
                    _drop_early(group, key)

    def submit(self, member: GroupMember, request: RowRequest) -> Future[Features]:
        """See GroupMember.submit."""
        answer: Future[Features] = Future()
        num_parts = request.part.count
        row_key = (request.position, request.row_hash(), num_parts)
        group, captured = member.group, None
        with self._lock:
            if member not in group.members:
                raise StoppedError(f"the session is closed: row {request.position} is not taken")
            if num_parts > 1:
                group.num_parts = group.num_parts or num_parts
                if num_parts != group.num_parts:
                    raise WireError(
                        f"row {request.position} is asked for in {num_parts} parts, the group's rows have "
                        f"{group.num_parts}"
                    )
            row = group.rows.get(row_key)
            if row is None:
                row = _Row(num_parts, self._admission.submit(group.session, replace(request, part=WHOLE)))
                row.taken = group.dropped.pop(row_key, set())
                group.rows[row_key] = row
                captured = row.captured
            features = row.features
            if features is None:
                row.waiters.append(_Waiter(member, request.part.index, answer))
            else:
                self._note_taken(group, row_key, row, {request.part.index})
        if features is not None:
            answer.set_result(features)
            return answer
        answer.add_done_callback(partial(self._on_answered, group, row_key, row))
        if captured is not None:
            captured.add_done_callback(partial(self._on_row_captured, group, row_key, row))
        return answer

    def leave(self, member: GroupMember) -> None:
        """See GroupMember.close."""
        group = member.group
        with self._lock:
            if member not in group.members:
                return
            group.members.remove(member)
            is_over = not group.members
            left = [waiter for row in group.rows.values() for waiter in row.waiters if waiter.member is member]
            for row_key, row in list(group.rows.items()):
                row.waiters = [waiter for waiter in row.waiters if waiter.member is not member]
                self._cancel_if_unwanted(group, row_key, row)
            if is_over:
                del self._groups[member.key]
                for row_key in list(group.rows):
                    _drop(group, row_key)
        if is_over:
            self._admission.close_session(group.session)
        for waiter in left:
            if waiter.answer.set_running_or_notify_cancel():
                waiter.answer.set_exception(StoppedError("the session was closed"))

    def _on_row_captured(self, group: _Group, row_key: RowKey, row: _Row, captured: Future[Features]) -> None:
        """The engine, or whoever cancelled the row, is done with it: everyone who waits is told."""
        self._on_captured(captured)
        is_cancelled = captured.cancelled()
        error = None if is_cancelled else captured.exception()
        features = captured.result() if not is_cancelled and error is None else None
        with self._lock:
            row.captured = None
            if is_cancelled:
                return  # because nobody waits
            waiters = [waiter for waiter in row.waiters if waiter.answer.set_running_or_notify_cancel()]
            row.waiters = []
            if group.rows.get(row_key) is row:
                if features is None:
                    _drop(group, row_key)
                else:
                    row.features, row.kept_until = features, time.monotonic() + self._bounds.seconds
                    self._note_taken(group, row_key, row, {waiter.part for waiter in waiters})
                    self._keep_bounds()
        for waiter in waiters:
            if error is not None:
                waiter.answer.set_exception(error)
            else:
                waiter.answer.set_result(features)  # type: ignore[arg-type]

    def _on_answered(self, group: _Group, row_key: RowKey, row: _Row, answer: Future[Features]) -> None:
        """A row that nobody waits for any more never reaches the engine."""
        if not answer.cancelled():
            return
        with self._lock:
            row.waiters = [waiter for waiter in row.waiters if waiter.answer is not answer]
            self._cancel_if_unwanted(group, row_key, row)

    def _cancel_if_unwanted(self, group: _Group, row_key: RowKey, row: _Row) -> None:
        is_unwanted = group.rows.get(row_key) is row and not row.waiters
        if is_unwanted and row.captured is not None and row.captured.cancel():
            _drop(group, row_key)

    def _note_taken(self, group: _Group, row_key: RowKey, row: _Row, parts: set[int]) -> None:
        row.taken |= parts
        if len(row.taken) == row.num_parts:
            _drop(group, row_key)

    def _keep_bounds(self) -> None:
        """Drop the oldest of the group that keeps most, so that no group is the reason to drop another's."""
        while (num_rows := self.num_kept_rows()) > 1 and (
            num_rows > self._bounds.num_rows or self.num_kept_bytes() > self._bounds.num_bytes
        ):
            group = max(self._groups.values(), key=lambda group: group.num_kept_bytes)
            _drop_early(group, next(key for key, row in group.rows.items() if row.features is not None))


def _drop(group: _Group, row_key: RowKey) -> None:
    group.rows.pop(row_key).features = None


def _drop_early(group: _Group, row_key: RowKey) -> None:
    group.dropped[row_key] = group.rows[row_key].taken
    if len(group.dropped) > _MAX_DROPPED:
        del group.dropped[next(iter(group.dropped))]
    _drop(group, row_key)


class GroupMember:
    """One session of a group."""

    def __init__(self, groups: RowGroups, key: str, group: _Group) -> None:
        self._groups = groups
        self.key = key
        self.group = group

    def submit(self, request: RowRequest) -> Future[Features]:
        """Features of the whole row that a part is asked for of.

        Raises:
            WireError: another number of parts than the group's.
            ServerBusyError: too many rows of the group wait.
            StoppedError: the session, or admission, is closed.
        """
        return self._groups.submit(self, request)

    def close(self) -> None:
        """Leave; what only this session waited for is cancelled, the rest of the group goes on. Idempotent."""
        self._groups.leave(self)
