"""What the pool counts, and how long answers take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

_WINDOW = 200
_SHORTEST_LIMIT_S = 0.1
"""Below this a slow answer is the scheduler's doing, not a server's."""


@dataclass(slots=True)
class ServerTotals:
    """Of one server of the pool, over all its comings and goings."""

    rows: int = 0
    """Answers used."""
    tokens: int = 0
    """Of those rows."""
    answer_s: float = 0.0
    """Time from request to answer, of those rows."""
    queued_s: float = 0.0
    computed_s: float = 0.0
    deaths: int = 0
    """How often it was lost."""


@dataclass(frozen=True, slots=True)
class ServerStats:
    """One server of the pool: what it did, and how it is now."""

    totals: ServerTotals
    up: bool
    rows_outstanding: int
    tokens_outstanding: int


@dataclass(slots=True)
class PoolTotals:
    """Counted since the pool was opened."""

    rows_received: int = 0
    bytes_received: int = 0
    rows_retried: int = 0
    """Rows asked for again because a reply was lost or damaged."""
    rows_moved: int = 0
    """Rows asked for again because their server died."""
    server_deaths: int = 0
    """How often a server of the pool was lost."""
    rows_hedged: int = 0
    """Rows that took so long that a second server was asked as well."""
    hedges_won: int = 0
    """Of these, those that the second server answered first."""
    busy_replies: int = 0
    """Requests refused by a full queue, and made again later."""
    late_replies: int = 0
    """Replies to rows already answered or given up; dropped."""
    damaged_replies: int = 0
    """Replies that were not what was sent; dropped."""
    queued_s: float = 0.0
    """Time rows waited at servers."""
    computed_s: float = 0.0
    """Time servers computed."""
    transfer_s: float = 0.0
    """Time from the heads of replies to their delivery."""


@dataclass(slots=True)
class PoolStats(PoolTotals):
    """Totals since the pool was opened, and how it is now: a copy that changes no more."""

    rows_waiting: int = 0
    """Rows that no server has been asked for yet, or again."""
    servers_up: int = 0
    """A recording beside them is none."""
    answer_p50_s: float = 0.0
    """Half of the last answers took no longer; 0 before the first."""
    answer_p95_s: float = 0.0
    servers: Mapping[str, ServerStats] = field(default_factory=dict)
    """By name; servers that have left stay, for their totals."""


class AnswerTimes:
    """Seconds from request to answer, of the last rows of the pool."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=_WINDOW)
        self._num_answers = 0

    def add(self, seconds: float) -> None:
        self._window.append(seconds)
        self._num_answers += 1

    def percentile(self, percent: float) -> float:
        """The smallest time that `percent` of the window do not exceed; 0 for an empty one."""
        if not self._window:
            return 0.0
        ordered = sorted(self._window)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

    def limit_s(self, factor: float, after_rows: int) -> float | None:
        """A row out for longer is slow; None before `after_rows` answers, when nobody can tell."""
        if self._num_answers < after_rows:
            return None
        return max(factor * self.percentile(95), _SHORTEST_LIMIT_S)
