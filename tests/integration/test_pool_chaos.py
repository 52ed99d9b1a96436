"""Servers die, return, hang, join, leave, refuse and damage at random: every row is trained once, in order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from paceline.client.budget import PrefetchBudget
from paceline.client.stream import FeatureStream
from paceline.errors import DamagedError, ServerFailedError
from paceline.schema.features import Features
from paceline.schema.rows import RowRequest
from small_engine import SmallEngine, expected_hidden, small_row
from troubled_servers import ChangingServers, Server, eventually, pool_of

NUM_ROWS = 200
PREFETCH_ROWS = 6


class Weather:
    """What the servers suffer, drawn from a seed, by rows trained; everything passes after a while."""

    def __init__(self, seed: int, servers: list[Server], listed: ChangingServers) -> None:
        self._draw = random.Random(seed)
        self._servers = servers
        self._listed = listed
        self._timers: list[threading.Timer] = []
        self._last_death = 0
        self.happened: dict[str, int] = {}

    def pass_over(self, num_trained: int) -> None:
        """Perhaps something happens now."""
        server = self._draw.choice(self._servers)
        chance = self._draw.random()
        # so seldom that no row meets four deaths
        if chance < 0.5:
            if num_trained - self._last_death > 2 * PREFETCH_ROWS:
                self._last_death = num_trained
                self._happens("all die" if chance < 0.1 else "death")
                for each in self._servers if chance < 0.1 else [server]:
                    each.die()
                    self._later(each.come_back)
        elif chance < 0.55 and server.name != self._servers[0].name:
            self._happens("leaves")
            self._listed.change(remove=(server.name,))
            self._later(lambda: self._listed.change(add=(server,)))

    def clear(self) -> None:
        for timer in self._timers:
            timer.join()

    def _happens(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    def _later(self, call: Callable[[], None]) -> None:
        timer = threading.Timer(self._draw.uniform(0.0, 0.3), call)
        self._timers.append(timer)
        timer.start()


def troubled_servers(seed: int) -> list[Server]:
    """Three servers with short queues; the first who gets certain rows loses them, or takes long."""
    draw = random.Random(seed)
    kinds = ("damaged", "failed", "slow")
    trouble = {position: kinds[i % 3] for i, position in enumerate(draw.sample(range(30, NUM_ROWS), 30))}

    def delay_s(request: RowRequest) -> float:
        if trouble.get(request.position) == "slow":
            del trouble[request.position]
            return 0.5
        return 0.001 * (request.position % 4)

    def spoil(request: RowRequest, features: Features) -> Features:
        kind = trouble.pop(request.position, None)
        if kind == "damaged":
            raise DamagedError("checksum 12ab, expected 34cd")
        if kind == "failed":
            raise ServerFailedError("launch failed")
        return features

    return [
        Server(name, SmallEngine(num_threads=2, num_slots=2, delay_s=delay_s, spoil=spoil), max_queued_rows=1)
        for name in "abc"
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_position_is_trained_once_and_in_order_whatever_happens_to_the_servers(seed: int) -> None:
    servers = troubled_servers(seed)
    listed = ChangingServers(*servers)
    weather = Weather(seed, servers, listed)
    budget = PrefetchBudget(PREFETCH_ROWS, 1 << 20)
    trained = []
    with pool_of(*servers, listed=listed) as pool:
        with FeatureStream(small_row, pool, budget, "training", range(NUM_ROWS), row_timeout_s=60) as stream:
            for row in stream:
                assert row.features.hidden.equal(expected_hidden(row.row.tokens, (1, 3)))
                trained.append(row.row.position)
                time.sleep(0.002)
                weather.pass_over(len(trained))
            stats = stream.stats
        weather.clear()
        pool_stats = pool.stats
        eventually(lambda: not pool._rows.waiting and not pool._orders)
        eventually(lambda: not pool._rows.out())
        assert all(link.reserved_for is None for link in pool._rows.links.values())
    assert trained == list(range(NUM_ROWS))
    assert stats.rows_received == pool_stats.rows_received == NUM_ROWS
    assert stats.rows_asked_ahead + stats.rows_not_asked_ahead == NUM_ROWS - 1
    assert stats.rows_asked_ahead >= 0.95 * (NUM_ROWS - 1)
    assert budget.rows_in_flight == budget.bytes_in_flight == 0
    # the premise: all of it happened
    assert set(weather.happened) == {"death", "all die", "leaves"}
    assert min(pool_stats.server_deaths, pool_stats.rows_moved, pool_stats.rows_retried, pool_stats.busy_replies) > 3
    assert min(pool_stats.damaged_replies, pool_stats.rows_hedged) > 0
