"""Parts of rows from real servers: each rank gets its own, each row is computed once, and a lost rank costs nothing."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forking import Commands
from paceline.client.pool import FeaturePool
from paceline.client.remote import RemoteConnection
from paceline.client.server_list import FixedServers
from paceline.config.placement import PoolConfig
from paceline.errors import HandshakeError, ServerBusyError, WireError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.parts import WHOLE, Part, slice_features
from paceline.schema.rows import RowRequest, request_features
from paceline.target.groups import KeptBounds
from paceline.target.server.server import TargetServer
from paceline.transport.base import Delivery
from served import start_servers
from small_engine import SmallEngine, small_row
from small_server import connect, serve
from talk import Talk
from tiny import tiny_request

SPEC = FeatureSpec((1, 3), final_hidden="supervised", greedy=True, logsumexp=True, halo=2)
SPECS = {"training": SPEC}
GROUP, STRANGERS = "ab" * 16, "cd" * 16


@contextmanager
def group_on(
    url: str, num_parts: int, kind: str = "http", directory: Path | None = None
) -> Iterator[list[RemoteConnection]]:
    """A session for each rank of a group."""
    with ExitStack() as stack:
        connections = []
        for _ in range(num_parts):
            transport = {"kind": kind, "directory": str(directory) if directory else None}
            connections.append(connect(url, transport=transport))
            stack.callback(connections[-1].close)
            connections[-1].open_session(SPECS, GROUP)
        yield connections


def asked(position: int, part: Part, num_tokens: int | None = None) -> RowRequest:
    return request_features(small_row(position, num_tokens=num_tokens), "training", 1, part)


def is_right(answer: Future[Delivery], request: RowRequest, engine: SmallEngine) -> bool:
    """Bit for bit what slicing the engine's own features gives; lets go of them."""
    whole = engine._features(request, SPEC)
    expected = slice_features(whole, len(request.tokens), request.part, SPEC.halo).tensors()
    delivery = answer.result(20)
    received = delivery.take().tensors()
    right = received.keys() == expected.keys() and all(received[name].equal(expected[name]) for name in expected)
    delivery.release()
    return right


def figure(server: TargetServer, name: str) -> float:
    text = Talk(server.url).ask("GET", "/metrics").body.decode()
    (value,) = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
    return float(value)


def eventually(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["http", "file", "gloo"])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_each_row_is_computed_once_for_all_ranks_that_ask_in_any_order(
    kind: str, num_parts: int, tmp_path: Path
) -> None:
    engine = SmallEngine(num_threads=2, delay_s=lambda request: 0.002 * (request.position % 3))
    num_rows = 24
    wrong: list[int] = []
    with serve(engine) as server, group_on(server.url, num_parts, kind, tmp_path) as connections:

        def train(index: int) -> None:
            order = list(range(num_rows))
            random.Random(index).shuffle(order)
            for start in range(0, num_rows, 3):
                requests = [asked(position, Part(index, num_parts)) for position in order[start : start + 3]]
                answers = [(connections[index].request(request), request) for request in requests]
                wrong.extend(request.position for answer, request in answers if not is_right(answer, request, engine))

        threads = [threading.Thread(target=train, args=(index,)) for index in range(num_parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {connection.transport for connection in connections} == {kind}
        assert wrong == []
        assert sorted(position for _, position in engine.submitted) == list(range(num_rows))
        assert figure(server, "paceline_computed_rows_total") == num_rows
        eventually(lambda: figure(server, "paceline_row_parts_total") == num_rows * num_parts, "a part is not counted")
        tokens = sum(small_row(position).num_tokens for position in range(num_rows))
        assert figure(server, "paceline_computed_tokens_total") == figure(server, "paceline_row_tokens_total") == tokens
        assert figure(server, "paceline_kept_bytes") == figure(server, "paceline_kept_rows") == 0
        eventually(lambda: engine.live["training"] == 0, "features outlive the last part")


def test_only_a_parts_bytes_travel() -> None:
    engine = SmallEngine()
    with serve(engine) as server, group_on(server.url, 4) as connections:
        before = figure(server, "paceline_sent_bytes_total")
        request = asked(0, Part(1, 4), num_tokens=4000)
        assert is_right(connections[1].request(request), request, engine)
        eventually(lambda: figure(server, "paceline_sent_bytes_total") > before, "nothing was sent")
        num_bytes = 4 * 4000 * (2 * 8 + 1 + 9 + 1)
        assert figure(server, "paceline_sent_bytes_total") - before == pytest.approx(num_bytes / 4, rel=0.05)
        assert figure(server, "paceline_kept_bytes") == pytest.approx(num_bytes, rel=0.05)


@pytest.mark.parametrize("how", ["ends its session", "lets its lease run out"])
def test_what_is_kept_for_a_rank_that_is_lost_is_freed_with_the_group(how: str) -> None:
    """Without a collection of garbage."""
    engine = SmallEngine()
    gc.disable()
    try:
        with serve(engine, max_lease_s=0.5 if how.startswith("lets") else 600.0) as server:
            talk = Talk(server.url)
            sessions = [talk.session(group=GROUP) for _ in range(2)]
            for position in range(4):
                assert talk.row(sessions[0], asked(position, Part(0, 2))).status == 200
            assert figure(server, "paceline_kept_rows") == 4
            assert engine.live["training"] == 4
            if how.startswith("ends"):
                talk.of_session("DELETE", sessions[1])
                assert figure(server, "paceline_kept_rows") == 4  # the other may ask again, or another may join
                talk.of_session("DELETE", sessions[0])
            eventually(lambda: server.sessions.count() == 0, "the leases do not run out")
            eventually(lambda: engine.live["training"] == 0, "features of a group that is gone are kept")
            assert figure(server, "paceline_kept_rows") == 0
    finally:
        gc.enable()


def test_a_rank_that_never_asks_costs_no_more_memory_than_the_bound_and_a_late_one_gets_its_parts() -> None:
    engine = SmallEngine()
    with serve(engine, kept=KeptBounds(num_rows=3)) as server, group_on(server.url, 2) as (ahead, late):
        for position in range(40):
            assert is_right(ahead.request(asked(position, Part(0, 2))), asked(position, Part(0, 2)), engine)
            assert engine.live["training"] <= 3 + 1  # one may be freed a moment later
        assert figure(server, "paceline_kept_rows") == 3
        for position in range(40):
            assert is_right(late.request(asked(position, Part(1, 2))), asked(position, Part(1, 2)), engine)
        assert figure(server, "paceline_computed_rows_total") == 40 + 37


def test_a_row_is_kept_for_a_bounded_time() -> None:
    engine = SmallEngine()
    with serve(engine, kept=KeptBounds(seconds=0.3)) as server, group_on(server.url, 2) as (first, _):
        assert is_right(first.request(asked(0, Part(0, 2))), asked(0, Part(0, 2)), engine)
        assert figure(server, "paceline_kept_rows") == 1
        eventually(lambda: engine.live["training"] == 0, "it is kept for ever")
        assert figure(server, "paceline_kept_rows") == 0


def test_full_queues_hold_nobody_up_whose_row_is_computed_already() -> None:
    """One row in the engine, and of each session one unsent and one that waits: ranks that ask in opposite orders."""
    engine = SmallEngine(num_slots=1)
    engine.hold(0, 1)
    bounds = {"max_unsent_rows": 1, "max_queued_rows": 1}
    with serve(engine, **bounds) as server, group_on(server.url, 2) as (first, second):
        answers = []
        for connection, position, part in ((first, 0, 0), (first, 1, 0), (second, 1, 1), (second, 0, 1)):
            request = asked(position, Part(part, 2))
            answers.append((connection.request(request), request))
            time.sleep(0.1)  # each comes by a connection of its own
        eventually(lambda: server.sessions.num_waiting() == 2, "the rows do not wait")
        with pytest.raises(ServerBusyError, match="1 rows of this session are waiting, 1 are allowed"):
            first.request(asked(2, Part(0, 2))).result(10)
        engine.let_go(0, 1)
        assert all(is_right(answer, request, engine) for answer, request in answers)
        assert sorted(position for _, position in engine.submitted) == [0, 1]


def test_a_session_that_the_server_forgot_comes_back_to_its_group() -> None:
    engine = SmallEngine()
    with serve(engine) as server, group_on(server.url, 2) as (first, second):
        assert is_right(first.request(asked(0, Part(0, 2))), asked(0, Part(0, 2)), engine)
        forgotten = second._session
        assert forgotten is not None
        server.sessions.end(forgotten.reply.session)
        assert is_right(second.request(asked(0, Part(1, 2))), asked(0, Part(1, 2)), engine)
        assert len(engine.submitted) == 1


def test_what_a_group_did_not_agree_on_is_refused_and_strangers_get_nothing_of_it() -> None:
    engine = SmallEngine()
    with serve(engine) as server, group_on(server.url, 2) as (first, second):
        assert is_right(first.request(asked(0, Part(0, 2))), asked(0, Part(0, 2)), engine)
        with pytest.raises(WireError, match="row 1 is asked for in 4 parts, the group's rows have 2"):
            second.request(asked(1, Part(1, 4))).result(10)
        stranger, alone = connect(server.url), connect(server.url)
        other = connect(server.url)
        try:
            stranger.open_session(SPECS, STRANGERS)
            assert is_right(stranger.request(asked(0, Part(1, 2))), asked(0, Part(1, 2)), engine)
            assert len(engine.submitted) == 2
            alone.open_session(SPECS)
            with pytest.raises(WireError, match="by a session of no group"):
                alone.request(asked(0, Part(1, 2))).result(10)
            with pytest.raises(HandshakeError, match="all ranks of a group register the same"):
                other.open_session({"training": replace(SPEC, halo=3)}, GROUP)
        finally:
            for connection in (stranger, alone, other):
                connection.close()
        assert is_right(second.request(asked(0, Part(1, 2))), asked(0, Part(1, 2)), engine)
        assert len(engine.submitted) == 2


def test_ranks_of_a_group_may_ask_for_whole_rows_besides() -> None:
    """Evaluation: each rank has rows of its own."""
    engine = SmallEngine()
    with serve(engine) as server, group_on(server.url, 2) as connections:
        for index, connection in enumerate(connections):
            for position in range(4):
                for part in (WHOLE, Part(index, 2)):
                    assert is_right(connection.request(asked(position, part)), asked(position, part), engine)
        assert figure(server, "paceline_computed_rows_total") == 4 + 2 * 4
        eventually(lambda: figure(server, "paceline_row_parts_total") == 8, "a part is not counted")
        assert figure(server, "paceline_kept_rows") == 0


def test_the_time_of_a_row_is_shared_out_over_its_parts() -> None:
    engine = SmallEngine(delay_s=lambda request: 0.4)
    with serve(engine) as server, group_on(server.url, 4) as connections:
        answers = [one.request(asked(0, Part(index, 4))) for index, one in enumerate(connections)]
        times = [answer.result(10).features.computed_s for answer in answers]
        assert sum(times) == pytest.approx(0.4, abs=0.1)
        assert max(times) == min(times)
        assert figure(server, "paceline_engine_busy_seconds_total") == pytest.approx(0.4, abs=0.1)


def test_a_server_killed_between_two_parts_costs_one_computation_and_no_bit(
    commands: Commands, tiny_target: Path, tmp_path: Path
) -> None:
    servers = start_servers(commands, tiny_target, tmp_path, 2)
    by_url = {server.url: server for server in servers}
    parts = [Part(0, 2), Part(1, 2)]
    request = tiny_request((11, 6), spans=[(3, 11), (12, 17)])
    with ExitStack() as stack:
        whole_from = connect(servers[0].url)
        stack.callback(whole_from.close)
        whole_from.open_session(SPECS)
        whole = whole_from.request(request).result(60).take()
        listed = FixedServers({url: lambda url=url: connect(url) for url in by_url})
        pools = []
        for _ in parts:
            pools.append(FeaturePool(listed, SPECS, PoolConfig(), group=GROUP))
            stack.callback(pools[-1].close)
        for pool in pools:
            eventually(lambda pool=pool: pool.stats.servers_up == 2, "a server is not up")
        first = pools[0].submit(replace(request, part=parts[0])).result(60).take()
        asked_at = {url for url, stats in pools[0].stats.servers.items() if stats.totals.rows}
        (meeting_place,) = asked_at
        by_url[meeting_place].kill()
        second = pools[1].submit(replace(request, part=parts[1])).result(60).take()
        (elsewhere,) = (url for url, stats in pools[1].stats.servers.items() if stats.totals.rows)
        assert elsewhere != meeting_place
        for part, features in zip(parts, (first, second), strict=True):
            check_same(features, slice_features(whole, 17, part, SPEC.halo))
        third = pools[0].submit(replace(request, position=request.position, part=parts[0])).result(60).take()
        check_same(third, first)


def check_same(features: Features, expected: Features) -> None:
    received = features.tensors()
    assert received.keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(received[name], tensor), name
