"""Which rows are out at which servers, and which row goes where next. Plain state, guarded by the pool's lock."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import xxhash

from paceline.client.connection import Connection, HoldsSomeRows
from paceline.schema.features import FeatureSpec
from paceline.schema.parts import WHOLE
from paceline.schema.rows import RowRequest
from paceline.transport.base import Delivery

DEATHS_BEFORE_ALONE = 3
"""A row that was in flight at so many deaths of servers is asked for alone."""


@dataclass(slots=True, eq=False)
class Link:
    """An open session on one server, from its opening to its end, and what is out at it."""

    name: str
    connection: Connection
    attempts: set[Attempt] = field(default_factory=set)
    alive: bool = True
    """Whether its server has not been lost."""
    leaving: bool = False
    """Its server was taken from the list: what is out comes back, nothing more is asked."""
    reserved_for: Order | None = None
    """The row that will be, or is, alone here."""
    paused_until: float = 0.0
    """When a full queue is asked again, in seconds of `time.monotonic`."""
    num_refusals: int = 0
    """In a row, by a full queue."""
    last_asked: float = 0.0
    """When a row was asked for last, in seconds of `time.monotonic`."""

    @property
    def tokens_outstanding(self) -> int:
        return sum(len(attempt.order.request.tokens) for attempt in self.attempts)

    @property
    def is_server(self) -> bool:
        """Whether it can answer any row."""
        return not isinstance(self.connection, HoldsSomeRows)

    def can_answer(self, request: RowRequest) -> bool:
        return not isinstance(self.connection, HoldsSomeRows) or self.connection.holds(request)


@dataclass(slots=True, eq=False)
class Order:
    """A row somebody waits for, over all attempts."""

    request: RowRequest
    spec: FeatureSpec
    answer: Future[Delivery]
    number: int
    """In the order of submission, over all streams."""
    attempts: set[Attempt] = field(default_factory=set)
    """Those out now: none while it waits, two while it is hedged."""
    num_lost: int = 0
    deaths: list[str] = field(default_factory=list)
    """Servers that died while they had this row, one name an incident."""
    hedged: bool = False
    not_before: float = 0.0
    avoid: Link | None = None
    """Lost the row last; asked only if there is no other."""
    alone_at: Link | None = None
    """Reserved for this row."""
    over: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Earlier positions go first, whatever happened to them."""
        return (self.request.position, self.number)

    @property
    def must_be_alone(self) -> bool:
        return len(self.deaths) >= DEATHS_BEFORE_ALONE


@dataclass(slots=True, eq=False)
class Attempt:
    """One time a row was asked of one server."""

    order: Order
    link: Link
    since: float
    is_hedge: bool = False
    alone: bool = False
    sent: bool = True
    """Whether the server may have got it; not if asking failed at once."""
    answered: bool = False
    """Whether its reply was told; telling it again means nothing."""


class Assignments:
    """Rows that wait in order of their positions, rows that are out, and the servers that are up."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        """Up, by name."""
        self.leaving: set[Link] = set()
        self.waiting: list[Order] = []

    def wait(self, order: Order) -> None:
        """Let `order` be asked for when its turn comes, unless it is over, or out at another server."""
        if not order.over and not order.attempts:
            bisect.insort(self.waiting, order, key=lambda other: other.place)

    def next_attempt(self, now: float) -> Attempt | None:
        """The first waiting row that a server can be asked for now; None if there is none."""
        open_links = self._open_links(now)
        for i, order in enumerate(self.waiting):
            if order.not_before > now:
                continue
            if order.must_be_alone:
                link = self._place_alone(order, now)
                open_links = self._open_links(now)  # one may be reserved by now
            else:
                link = self._choose(order, open_links, now)
            if link is not None:
                del self.waiting[i]
                return self._put_out(Attempt(order, link, now, alone=order.must_be_alone))
        return None

    def hedges(self, now: float, limit_s: float) -> Iterator[Attempt]:
        """Second attempts for rows out longer than `limit_s`, while there is a second server to ask."""
        slow = [attempt for attempt in self.out() if self._is_slow(attempt, now, limit_s)]
        for attempt in sorted(slow, key=lambda attempt: attempt.order.place):
            request = attempt.order.request
            others = [link for link in self._open_links(now) if link is not attempt.link and link.can_answer(request)]
            link = _best(others, request)
            if link is not None:
                attempt.order.hedged = True
                yield self._put_out(Attempt(attempt.order, link, now, is_hedge=True))

    def out(self) -> list[Attempt]:
        """Everything asked for and not answered."""
        return [attempt for link in (*self.links.values(), *self.leaving) for attempt in link.attempts]

    def settle(self, attempt: Attempt) -> bool:
        """Take back an attempt that was answered; False if it had been, with its server."""
        if attempt not in attempt.link.attempts:
            return False
        attempt.link.attempts.remove(attempt)
        attempt.order.attempts.discard(attempt)
        if attempt.alone:
            self._end_reservation(attempt.order)
        return True

    def remove(self, link: Link) -> list[Attempt]:
        """Forget a server that was lost; what was out at it, in order."""
        if self.links.get(link.name) is link:
            del self.links[link.name]
        self.leaving.discard(link)
        attempts = sorted(link.attempts, key=lambda attempt: attempt.order.place)
        for attempt in attempts:
            self.settle(attempt)
        if link.reserved_for is not None:
            self._end_reservation(link.reserved_for)
        return attempts

    def leave(self, link: Link) -> None:
        """Ask nothing more of a server; what is out at it may come."""
        if self.links.get(link.name) is link:
            del self.links[link.name]
        self.leaving.add(link)
        order = link.reserved_for
        if order is not None and not order.attempts:
            self._end_reservation(order)

    def forget(self, order: Order) -> None:
        """An order that is over waits for nothing."""
        if order in self.waiting:
            self.waiting.remove(order)
        self._end_reservation(order)

    def _open_links(self, now: float) -> list[Link]:
        return [link for link in self.links.values() if link.reserved_for is None and link.paused_until <= now]

    def _choose(self, order: Order, open_links: list[Link], now: float) -> Link | None:
        """Whoever holds the row, else the best server; who lost it last only if there is no other."""
        links = open_links
        if order.request.part != WHOLE:
            # one with a full queue is waited for: elsewhere the row would be computed once more
            links = [link for link in self.links.values() if link.reserved_for is None]
        able = [link for link in links if link.can_answer(order.request)]
        able = [link for link in able if link is not order.avoid] or able
        link = _best([link for link in able if not link.is_server] or able, order.request)
        return link if link is not None and link.paused_until <= now else None

    def _place_alone(self, order: Order, now: float) -> Link | None:
        """The server reserved for `order`, once nothing else is out there."""
        if order.alone_at is None:
            able = [link for link in self.links.values() if link.can_answer(order.request)]
            order.alone_at = _best([link for link in able if link.reserved_for is None], order.request)
            if order.alone_at is not None:
                order.alone_at.reserved_for = order
        link = order.alone_at
        return link if link is not None and not link.attempts and link.paused_until <= now else None

    def _end_reservation(self, order: Order) -> None:
        if order.alone_at is not None:
            order.alone_at.reserved_for = None
            order.alone_at = None

    def _is_slow(self, attempt: Attempt, now: float, limit_s: float) -> bool:
        order = attempt.order
        return now - attempt.since > limit_s and not (order.over or order.hedged or attempt.alone)

    def _put_out(self, attempt: Attempt) -> Attempt:
        attempt.link.attempts.add(attempt)
        attempt.link.last_asked = attempt.since
        attempt.order.attempts.add(attempt)
        return attempt


def _best(links: list[Link], request: RowRequest) -> Link | None:
    """The server with the least work; for a part of a row the one that all ranks of its group choose."""
    return _least_work(links) if request.part == WHOLE else _meeting_place(links, request.position)


def _meeting_place(links: list[Link], position: int) -> Link | None:
    """Rendezvous hashing: whoever knows the same servers chooses the same one, without asking anybody.

    A server that joins or is lost moves its own share of the rows only. Ranks that disagree for a moment have a row
    computed twice, as does a hedge: the second server computes it for the rank that asked it, and for others whose
    hedges meet there.
    """
    return max(
        links, key=lambda link: (xxhash.xxh3_64_intdigest(f"{position}|{link.name}".encode()), link.name), default=None
    )


def _least_work(links: list[Link]) -> Link | None:
    """Of equals the one that has rested longest: several trainers with little to ask do not all ask the same one."""
    return min(links, key=lambda link: (link.tokens_outstanding, link.last_asked, link.name), default=None)
