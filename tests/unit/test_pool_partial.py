"""A source that has some rows only, beside servers: its rows come from it, and it is no server to wait for"""

from __future__ import annotations

import pytest

from paceline.client.pool import FeaturePool
from paceline.errors import DamagedError, ServerLostError
from paceline.schema.features import Features
from paceline.schema.rows import RowRequest, request_features
from small_engine import SmallEngine, small_row
from troubled_servers import Server, ServerConnection, pool_of, right


class PartialConnection(ServerConnection):
    def holds(self, request: RowRequest) -> bool:
        assert isinstance(self._at, Partial)
        return request.position in self._at.held


class Partial(Server):
    """Has the rows `held`; those of `damaged` it loses, and holds no more."""

    def __init__(self, name: str, held: set[int], damaged: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.held = set(held)

        def spoil(request: RowRequest, features: Features) -> Features:
            if request.position in damaged:
                self.held.discard(request.position)
                raise DamagedError("checksum 12ab, 34cd was written")
            return features

        super().__init__(name, SmallEngine(num_threads=2, spoil=spoil))

    def connect(self) -> PartialConnection:
        return PartialConnection(self)


def check_rows(pool: FeaturePool, positions: range) -> None:
    rows = [small_row(position) for position in positions]
    answers = [pool.submit(request_features(row, "training")) for row in rows]
    for answer, row in zip(answers, rows, strict=True):
        right(answer, row)


def test_rows_come_from_who_has_them_and_the_others_from_servers() -> None:
    disk, server = Partial("disk", held={0, 2, 3, 5}, damaged={3}), Server("a")
    with pool_of(disk, server) as pool:
        check_rows(pool, range(8))
        assert sorted(disk.positions()) == [0, 2, 3, 5]
        assert sorted(server.positions()) == [1, 3, 4, 6, 7]
        assert pool.stats.damaged_replies == 1


def test_rows_it_has_are_trained_while_every_server_is_away_and_the_wait_for_the_others_is_bounded() -> None:
    disk, server = Partial("disk", held={0, 1}), Server("a", alive=False)
    with pool_of(disk, server, all_down_timeout_s=0.5) as pool:
        check_rows(pool, range(2))
        with pytest.raises(ServerLostError, match=r"(?s)a: down for \d s: a: connection refused"):
            pool.submit(request_features(small_row(2), "training")).result(10)
        server.come_back()


def test_quick_reads_do_not_make_a_server_look_slow() -> None:
    """Forty rows from a disk in no time, then one from a server that takes its time: nobody else is asked for it."""
    disk = Partial("disk", held=set(range(40)))
    servers = [Server(name, SmallEngine(num_threads=1, delay_s=lambda _: 0.4)) for name in "ab"]
    with pool_of(disk, *servers, hedge_after_rows=1) as pool:
        check_rows(pool, range(41))
        assert pool.stats.rows_hedged == 0
