"""Pools of the ranks of a group: each row meets at one server, chosen without a word, whatever happens to servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import pytest
import xxhash

from feature_path import SPECS
from paceline.client.budget import PrefetchBudget
from paceline.client.pool import FeaturePool
from paceline.client.server_list import FixedServers
from paceline.client.stream import FeatureStream
from paceline.config.placement import PoolConfig
from paceline.schema.layout import reply_bytes
from paceline.schema.parts import Part, part_range
from paceline.schema.rows import Row, request_features
from paceline.transport.base import Delivery
from small_engine import SmallEngine, expected_hidden, small_info, small_row
from troubled_servers import Server, eventually, pool_of

PARTS = [Part(0, 2), Part(1, 2)]


@contextmanager
def ranks(*servers: Server, **settings: float) -> Iterator[list[FeaturePool]]:
    """A pool for each rank of a group of two; slow rows are hedged only where a test wants it."""
    settings = {"hedge_after_rows": 1_000_000, **settings}
    listed = FixedServers({server.name: server.connect for server in servers})
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
        pools = []
        for _ in PARTS:
            pools.append(FeaturePool(listed, SPECS, PoolConfig.model_validate(settings), group="ab" * 16))
            stack.callback(pools[-1].close)
        yield pools


def ask(pool: FeaturePool, part: Part, *positions: int) -> list[Future[Delivery]]:
    return [pool.submit(request_features(small_row(position), "training", 1, part)) for position in positions]


def is_right(answer: Future[Delivery], position: int, part: Part) -> bool:
    row = small_row(position)
    start, end = part_range(row.num_tokens, part)
    delivery = answer.result(10)
    features = delivery.take()
    right = features.part == part and features.hidden.equal(expected_hidden(row.tokens, (1, 3))[start:end])
    delivery.release()
    return right


def asked_by_both(server: Server) -> set[int]:
    """Positions that each rank asked this server for, and that no rank alone asked it for."""
    positions = server.positions()
    once = {position for position in positions if positions.count(position) == 1}
    assert once == set(), f"asked of {server.name} by one rank only"
    return set(positions)


def test_rows_are_spread_evenly_and_all_ranks_choose_the_same_server() -> None:
    servers = [Server(f"http://gpu{number}.example:8000") for number in range(3)]
    with ranks(*servers) as pools:
        eventually(lambda: all(pool.stats.servers_up == 3 for pool in pools))
        for pool, part in zip(pools, PARTS, strict=True):
            answers = ask(pool, part, *range(300))
            assert all(is_right(answer, position, part) for position, answer in enumerate(answers))
        shares = [asked_by_both(server) for server in servers]
        assert [len(share) for share in shares] == pytest.approx([100] * 3, abs=20)
        for server, share in zip(servers, shares, strict=True):
            assert share == {position for position in range(300) if place_told_by_the_docs(position) == server.name}


def place_told_by_the_docs(position: int) -> str:
    """docs/wire-format.md: the largest xxh3-64 (as a number) of POSITION|URL."""
    urls = [f"http://gpu{number}.example:8000" for number in range(3)]
    return max(urls, key=lambda url: int(xxhash.xxh3_64_hexdigest(f"{position}|{url}".encode()), 16))


def test_a_server_that_dies_moves_its_own_rows_only_and_they_meet_again() -> None:
    servers = [Server(name) for name in "abc"]
    with ranks(*servers) as pools:
        eventually(lambda: all(pool.stats.servers_up == 3 for pool in pools))
        for pool, part in zip(pools, PARTS, strict=True):
            assert all(is_right(answer, i, part) for i, answer in enumerate(ask(pool, part, *range(60))))
        before = {server.name: asked_by_both(server) for server in servers}
        servers[0].die()
        for server in servers:
            server.engine.submitted.clear()
        for pool, part in zip(pools, PARTS, strict=True):
            assert all(is_right(answer, i, part) for i, answer in enumerate(ask(pool, part, *range(60))))
        after = {server.name: asked_by_both(server) for server in servers[1:]}
        moved = {name: after[name] - before[name] for name in after}
        assert all(before[name] <= after[name] for name in after)
        assert moved["b"] | moved["c"] == before["a"]
        assert len(moved["b"]) > 0 < len(moved["c"])


def test_slow_rows_are_asked_of_the_same_second_server_by_all_ranks() -> None:
    servers = [Server(name, SmallEngine(num_threads=8)) for name in "abc"]
    for server in servers:
        server.engine.hold(100, 101, 102, 103)
    with ranks(*servers, hedge_after_rows=1) as pools:
        eventually(lambda: all(pool.stats.servers_up == 3 for pool in pools))
        for pool, part in zip(pools, PARTS, strict=True):
            assert all(is_right(answer, i, part) for i, answer in enumerate(ask(pool, part, *range(20))))
        for server in servers:
            server.engine.submitted.clear()
        slow = [ask(pool, part, *range(100, 104)) for pool, part in zip(pools, PARTS, strict=True)]
        eventually(lambda: sum(len(server.positions()) for server in servers) == 16)
        assert all(pool.stats.rows_hedged >= 4 for pool in pools)
        shares = [asked_by_both(server) for server in servers]
        assert sum(len(share) for share in shares) == 8
        for server in servers:
            server.engine.let_go(100, 101, 102, 103)
        for part, answers in zip(PARTS, slow, strict=True):
            assert all(is_right(answer, 100 + i, part) for i, answer in enumerate(answers))


def test_a_full_server_is_waited_for_as_the_row_is_computed_there_anyway() -> None:
    servers = [Server(name, SmallEngine(num_slots=1), max_queued_rows=1) for name in "abc"]
    for server in servers:
        server.engine.hold(*range(12))
    with ranks(*servers) as pools:
        eventually(lambda: all(pool.stats.servers_up == 3 for pool in pools))
        answers = [ask(pool, part, *range(12)) for pool, part in zip(pools, PARTS, strict=True)]
        eventually(lambda: all(pool.stats.busy_replies > 3 for pool in pools))
        for server in servers:
            server.engine.let_go(*range(12))
        for part, some in zip(PARTS, answers, strict=True):
            assert all(is_right(answer, i, part) for i, answer in enumerate(some))
        assert set.union(*[asked_by_both(server) for server in servers]) == set(range(12))


def test_a_stream_hands_out_its_part_and_counts_the_bytes_of_that_alone() -> None:
    """Beside it one of whole rows on the same pool, as evaluation has."""
    part = Part(1, 2)
    with pool_of(Server("a")) as pool:
        budget = PrefetchBudget(2, 1 << 20)

        def rows(position: int) -> Row:
            return small_row(position, num_tokens=101)

        stream = FeatureStream(rows, pool, budget, "training", range(4), part=part)
        evaluation = FeatureStream(rows, pool, budget, "training", range(4), own_rows=1)
        with stream, evaluation:
            row = next(stream)
            whole = request_features(row.row, "training")
            half = reply_bytes(whole, SPECS["training"], small_info(), part)
            assert 2 * half < reply_bytes(whole, SPECS["training"], small_info()) + 1024
            eventually(lambda: stream.stats.bytes_in_flight in (half, 2 * half))
            assert (row.token_range, row.features.part, row.features.num_tokens) == ((51, 101), part, 50)
            assert [each.features.num_tokens for each in evaluation] == [101] * 4
            assert [each.row.position for each in stream] == [1, 2, 3]
