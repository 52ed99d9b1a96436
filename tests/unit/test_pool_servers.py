"""Servers that die, hang, return, join and leave: rows go elsewhere, each is answered once, and waits say why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from feature_path import SPECS
from paceline.client.budget import PrefetchBudget
from paceline.client.pool import FeaturePool
from paceline.client.server_list import FixedServers
from paceline.client.stream import FeatureStream
from paceline.config.placement import PoolConfig
from paceline.errors import (
    AuthorizationError,
    DamagedError,
    HandshakeError,
    RowKillsServersError,
    ServerBusyError,
    ServerLostError,
    StoppedError,
    TransportError,
)
from paceline.schema.features import Features
from paceline.schema.rows import RowRequest, request_features
from paceline.transport.base import Delivery
from small_engine import SmallEngine, small_info, small_row
from troubled_servers import ChangingServers, Server, ServerConnection, eventually, pool_of, right


def ask(pool: FeaturePool, *positions: int) -> list[Future[Delivery]]:
    return [pool.submit(request_features(small_row(position), "training")) for position in positions]


def all_right(answers: list[Future[Delivery]], *positions: int) -> None:
    for answer, position in zip(answers, positions, strict=True):
        right(answer, small_row(position))


def held(name: str, *positions: int) -> Server:
    """A server that keeps back some rows."""
    engine = SmallEngine(num_threads=4)
    engine.hold(*positions)
    return Server(name, engine)


def has_got(server: Server, *positions: int) -> Callable[[], bool]:
    return lambda: server.positions() == [*positions]


# ---- deaths


def test_the_rows_of_a_server_that_dies_go_to_the_others_and_count_as_no_retry() -> None:
    first, second = held("a", 0, 1, 2), Server("b")
    servers = ChangingServers(first)
    with pool_of(first, second, listed=servers, row_retries=0) as pool:
        answers = ask(pool, 0, 1, 2)
        servers.change(add=(second,))
        eventually(lambda: pool.stats.servers_up == 2 and len(first.positions()) == 3)
        first.die()
        all_right(answers, 0, 1, 2)
        stats = pool.stats
        assert (stats.rows_moved, stats.rows_retried) == (3, 0)
        assert stats.server_deaths == stats.servers["a"].totals.deaths == 1, "three rows, one death"
        assert (stats.servers_up, stats.servers["a"].up, stats.servers["b"].totals.rows) == (1, False, 3)
        assert second.positions() == [0, 1, 2]


def test_a_server_that_returns_gets_work_again() -> None:
    first, second = Server("a"), Server("b")
    with pool_of(first, second) as pool:
        first.die()
        all_right(ask(pool, 0, 1, 2), 0, 1, 2)
        assert pool.stats.servers_up == 1, "the premise: its death was noticed"
        first.come_back()
        eventually(lambda: pool.stats.servers_up == 2)
        num_before = len(first.positions())
        all_right(ask(pool, 3), 3)
        assert len(first.positions()) == num_before + 1
        assert first.num_connects >= 2


def test_a_dead_server_is_tried_less_and_less_often() -> None:
    dead, living = Server("a", alive=False), Server("b")
    with pool_of(dead, living):
        time.sleep(1.2)
        assert 3 <= dead.num_connects <= 6  # about 0, 0.2, 0.6, 1.4 s


def test_what_a_server_answers_after_it_was_given_up_is_dropped() -> None:
    class Deaf(ServerConnection):
        """Goes on although it was given up."""

        def request(self, request: RowRequest) -> Future[Delivery]:
            told.append(super().request(request))
            return told[-1]

        def abort(self) -> None:
            pass

    told: list[Future[Delivery]] = []

    def spoil(request: RowRequest, features: Features) -> Features:
        if request.position == 1:
            raise ServerLostError("connection reset")
        return features

    engine = SmallEngine(num_threads=2, spoil=spoil)
    engine.hold(0)
    first, second = Server("a", engine), held("b", 0)
    servers = ChangingServers()
    servers.change_to({"a": lambda: Deaf(first)})
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0)
        eventually(has_got(first, 0))
        answers += ask(pool, 1)
        eventually(lambda: pool.stats.server_deaths > 0)
        servers.change_to({"b": second.connect})
        right(answers[1], small_row(1))
        engine.let_go(0)
        eventually(lambda: pool.stats.late_replies == 1)
        assert not answers[0].done(), "the second server has it by now"
        eventually(lambda: told[0].result().features.num_tokens == 0)  # it was let go of
        second.engine.let_go(0)
        all_right(answers[:1], 0)
        assert pool.stats.rows_received == 2


# ---- no server left


def test_with_no_server_left_rows_wait_and_a_server_that_returns_takes_them() -> None:
    server = held("a", 0, 1, 2)
    with pool_of(server) as pool:
        answers = ask(pool, 0, 1, 2)
        eventually(lambda: len(server.positions()) == 3)
        server.die()
        answers += ask(pool, 3)
        eventually(lambda: pool.stats.rows_waiting == 4)
        server.engine.let_go(0, 1, 2)
        server.come_back()
        all_right(answers, 0, 1, 2, 3)
        assert server.positions() == [0, 1, 2, 0, 1, 2, 3]


def test_a_wait_for_servers_says_what_is_wrong_with_each_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Server("a"), Server("b")
    with (
        caplog.at_level(logging.WARNING),
        pool_of(first, second, all_down_timeout_s=0.9, log_every_s=0.3) as pool,
    ):
        first.die()
        second.die()
        answers = ask(pool, 0, 1)
        for answer in answers:
            with pytest.raises(
                ServerLostError,
                match=r"(?s)no server .* 2 rows wait, the first is row 0:.*"
                r"  a: down for \d s: a: connection refused.*  b: down for \d s: b: connection refused.*"
                r"pool.all_down_timeout_s is over",
            ):
                answer.result(10)
        waits = [record for record in caplog.records if "rows wait" in record.getMessage()]
        assert 2 <= len(waits) <= 4
        with pytest.raises(ServerLostError):  # it is over until a server returns
            ask(pool, 2)[0].result(1)
        first.come_back()
        eventually(lambda: pool.stats.servers_up == 1)
        all_right(ask(pool, 2), 2)


# ---- the start


def test_a_pool_begins_with_one_server_and_the_others_join() -> None:
    first, late = held("a", 0), Server("b", alive=False)
    with pool_of(first, late) as pool:
        assert pool.stats.servers_up == 1
        late.come_back()
        eventually(lambda: pool.stats.servers_up == 2)
        answers = ask(pool, 0, 1)
        right(answers[1], small_row(1))
        first.engine.let_go(0)
        right(answers[0], small_row(0))
    assert (first.positions(), late.positions()) == ([0], [1])


def test_a_pool_waits_for_its_first_server() -> None:
    server = Server("a", alive=False)
    threading.Timer(0.5, server.come_back).start()
    with pool_of(server) as pool:
        all_right(ask(pool, 0), 0)


def test_a_pool_that_finds_no_server_names_the_reason_of_each() -> None:
    servers = [Server("a", alive=False), Server("b", alive=False)]
    with (
        pytest.raises(ServerLostError, match=r"(?s)a: connection refused.*b: connection refused"),
        pool_of(*servers, all_down_timeout_s=0.3),
    ):
        pass
    assert all(server.num_connects >= 1 for server in servers)


@pytest.mark.parametrize("error", [HandshakeError, AuthorizationError, ZeroDivisionError])
def test_a_wrong_server_at_the_start_ends_it(error: type[Exception]) -> None:
    good, wrong = Server("a"), Server("b")
    wrong.refuses = error("b has w2, this run expects w")
    with pytest.raises(error, match="b has w2"), pool_of(good, wrong):
        pass


def test_a_server_that_hangs_while_it_is_connected_holds_up_nobody() -> None:
    let_go = threading.Event()

    class Hangs(Server):
        def check(self) -> None:
            let_go.wait(30)
            super().check()

    good, hanging = Server("a"), Hangs("b")
    started = time.monotonic()
    with pool_of(good, hanging) as pool:
        assert time.monotonic() - started < 4
        all_right(ask(pool, 0), 0)
        let_go.set()
        eventually(lambda: pool.stats.servers_up == 2)


# ---- a list that changes


def test_a_server_joins_while_rows_are_out() -> None:
    first, second = held("a", 0), Server("b")
    servers = ChangingServers(first)
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0)
        servers.change(add=(second,))
        eventually(lambda: pool.stats.servers_up == 2)
        answers += ask(pool, 1)
        right(answers[1], small_row(1))
        first.engine.let_go(0)
        right(answers[0], small_row(0))
    assert second.positions() == [1]


def test_a_server_taken_from_the_list_finishes_its_rows_and_gets_no_more() -> None:
    first, second = held("a", 0), Server("b")
    servers = ChangingServers(first, second)
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0)
        eventually(lambda: first.positions() == [0])
        (connection,) = first.open
        servers.change(remove=("a",))
        eventually(lambda: pool.stats.servers_up == 1)
        all_right(ask(pool, 1, 2), 1, 2)
        assert connection.num_closes == 0, "its row is still out"
        first.engine.let_go(0)
        all_right(answers, 0)
        eventually(lambda: connection.num_closes > 0 and not first.open)
        assert first.positions() == [0]
        assert pool.stats.server_deaths == 0
        servers.change(add=(first,))  # and it may come back
        eventually(lambda: pool.stats.servers_up == 2)


def test_a_leaving_server_that_dies_loses_its_rows_to_the_others() -> None:
    first, second = held("a", 0), Server("b")
    servers = ChangingServers(first, second)
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0)
        eventually(lambda: first.positions() == [0])
        servers.change(remove=("a",))
        eventually(lambda: pool.stats.servers_up == 1)
        first.die()
        all_right(answers, 0)
        assert second.positions() == [0]


@pytest.mark.parametrize("error", [HandshakeError, AuthorizationError])
def test_a_wrong_server_that_joins_later_is_left_out_until_its_entry_changes(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    good, wrong = Server("a"), Server("b")
    wrong.refuses = error("b has w2, this run expects w")
    servers = ChangingServers(good)
    with caplog.at_level(logging.ERROR), pool_of(good, wrong, listed=servers) as pool:
        servers.change(add=(wrong,))
        eventually(lambda: bool(caplog.records))
        assert caplog.records[0].getMessage() == "b is left out: b has w2, this run expects w"
        time.sleep(0.6)
        assert wrong.num_connects == 1
        all_right(ask(pool, 0), 0)
        wrong.refuses = None
        servers.change(add=(wrong,))  # the entry changes
        eventually(lambda: pool.stats.servers_up == 2)


def test_a_server_that_returns_with_another_target_is_left_out() -> None:
    good, wrong = held("a", 0), Server("b")
    with pool_of(good, wrong) as pool:
        wrong.die()
        answers = ask(pool, 0, 1)  # the second finds that b is gone
        right(answers[1], small_row(1))
        wrong.engine._info = small_info(weight_fingerprint="w2")
        wrong.come_back()
        eventually(lambda: "'w2', this run expects 'w'" in pool._membership.report())
        good.engine.let_go(0)
        right(answers[0], small_row(0))
        all_right(ask(pool, 3, 4, 5), 3, 4, 5)
        assert wrong.positions() == []


# ---- hedging


def test_a_row_that_takes_too_long_is_asked_of_a_second_server_and_the_first_reply_wins() -> None:
    first, second = held("a", 20), Server("b")
    with pool_of(first, second) as pool:
        for position in range(20):
            all_right(ask(pool, position), position)
        answers = ask(pool, 20)
        all_right(answers, 20)
        assert pool.stats.rows_hedged == pool.stats.hedges_won == 1
        assert (first.positions().count(20), second.positions().count(20)) == (1, 1)
        assert pool.stats.late_replies == 0
        first.engine.let_go(20)  # the loser's reply
        eventually(lambda: pool.stats.late_replies == 1)
        assert pool.stats.rows_received == 21
        assert pool.stats.answer_p95_s < 0.1


def test_nothing_is_asked_twice_before_enough_rows_have_come_or_with_one_server() -> None:
    first, second = held("a", 19), Server("b")
    with pool_of(first, second) as pool:
        for position in range(19):
            all_right(ask(pool, position), position)
        answers = ask(pool, 19)
        time.sleep(0.4)
        assert pool.stats.rows_hedged == 0
        first.engine.let_go(19)
        all_right(answers, 19)
    alone = held("a", 25)
    with pool_of(alone) as pool:
        for position in range(25):
            all_right(ask(pool, position), position)
        answers = ask(pool, 25)
        time.sleep(0.4)
        assert alone.positions().count(25) == 1
        alone.engine.let_go(25)
        all_right(answers, 25)


def test_a_hedged_row_outlives_the_death_of_either_server() -> None:
    first, second, third = held("a", 20), held("b", 20), Server("c")
    with pool_of(first, second, third) as pool:
        third.die()
        for position in range(20):
            all_right(ask(pool, position), position)
        answers = ask(pool, 20)
        eventually(lambda: first.positions().count(20) + second.positions().count(20) == 2)
        second.die()
        time.sleep(0.2)
        assert first.positions().count(20) == 1, "one of the two is enough"
        first.die()
        third.come_back()
        all_right(answers, 20)
        assert third.positions()[-1] == 20
        assert pool.stats.rows_hedged == 1


# ---- rows that kill


def test_a_row_that_kills_every_server_ends_the_run_and_is_named() -> None:
    servers = [Server(name, dies_of=(3,)) for name in "ab"]
    for server in servers:
        server.die()  # they return by themselves
    stop = threading.Event()

    def revive() -> None:
        while not stop.wait(0.02):
            for server in servers:
                server.come_back()

    reviver = threading.Thread(target=revive)
    reviver.start()
    try:
        with pool_of(*servers) as pool:
            budget = PrefetchBudget(4, 1 << 20)
            stream = FeatureStream(small_row, pool, budget, "training", range(12))
            assert [next(stream).row.position for _ in range(3)] == [0, 1, 2]
            row = small_row(3)
            with pytest.raises(
                RowKillsServersError,
                match=rf"row 3 was in flight at 4 deaths of servers \(.*\), the last time alone: .*row id {row.row_id} "
                rf"of epoch 0, {row.num_tokens} tokens of samples {row.sample_ids[0]}, {row.sample_ids[1]}:",
            ):
                next(stream)
            assert pool.stats.server_deaths == 4
            stream.close()
    finally:
        stop.set()
        reviver.join()
    lives = [lost for server in servers for lost in server.in_flight_at_death if 3 in lost]
    assert len(lives) == 4
    assert [3] in lives, "the last time it was alone"


def test_rows_that_were_beside_a_killer_are_cleared_one_by_one() -> None:
    server = Server("a", SmallEngine(num_threads=3, delay_s=lambda request: 0.1), dies_of=(2,))
    with pool_of(server, row_retries=0) as pool:
        *others, killer = ask(pool, 0, 1, 2)
        while not killer.done():
            server.come_back()
            time.sleep(0.01)
        assert isinstance(killer.exception(), RowKillsServersError)
        all_right(others, 0, 1)
    assert server.in_flight_at_death == [[0, 1, 2]] * 3 + [[2]]


def test_a_row_that_servers_died_with_waits_for_an_idle_one_and_keeps_it_to_itself() -> None:
    first = [held(name, 9) for name in "abc"]
    last = held("d", 7, 9)
    listed = ChangingServers(first[0])
    with pool_of(*first, last, listed=listed) as pool:
        (suspect,) = ask(pool, 9)
        for server, following in zip(first, (*first[1:], None), strict=True):
            eventually(has_got(server, 9))
            listed.change(remove=(server.name,))
            eventually(lambda: pool.stats.servers_up == 0)
            server.die()
            if following is not None:
                listed.change(add=(following,))
        (beside,) = ask(pool, 7)
        listed.change(add=(last,))
        eventually(lambda: last.positions() == [7])
        (later,) = ask(pool, 10)
        time.sleep(0.1)
        assert last.positions() == [7], "one waits for the server to be idle, the other for the first"
        last.engine.let_go(7)
        right(beside, small_row(7))
        eventually(lambda: last.positions() == [7, 9])
        (later_still,) = ask(pool, 8)
        time.sleep(0.1)
        assert last.positions() == [7, 9]
        last.engine.let_go(9)
        right(suspect, small_row(9))
        all_right([later, later_still], 10, 8)
        assert pool.stats.server_deaths == 3
        assert pool.stats.rows_moved == 3


def test_a_server_found_dead_did_not_die_of_the_row() -> None:
    servers = [held(name, 0) for name in "abc"]
    with pool_of(*servers) as pool:
        for server in servers:
            server.die()
        answers = ask(pool, 0)
        eventually(lambda: pool.stats.servers_up == 0)
        servers[0].come_back()
        eventually(has_got(servers[0], 0))
        answers += ask(pool, 1)
        right(answers[1], small_row(1))
        assert servers[0].positions() == [0, 1], "row 0 is not kept alone"
        servers[0].engine.let_go(0)
        right(answers[0], small_row(0))


# ---- other failures


def test_the_reason_of_the_last_loss_is_told() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        raise DamagedError("checksum 12ab, expected 34cd")

    server = Server("a", SmallEngine(spoil=spoil))
    with pool_of(server, row_retries=2) as pool:
        with pytest.raises(TransportError, match=r"row 0 was lost 3 times .* by a: checksum 12ab, expected 34cd"):
            ask(pool, 0)[0].result(10)
        assert pool.stats.damaged_replies == 3
        assert pool.stats.rows_retried == 2
        assert pool.stats.server_deaths == 0


def test_a_busy_server_is_left_alone_as_long_as_it_asks_for() -> None:
    times = []

    def spoil(request: RowRequest, features: Features) -> Features:
        times.append(time.monotonic())
        if len(times) == 1:
            raise ServerBusyError("the queue is full", retry_after_s=0.4)
        return features

    with pool_of(Server("a", SmallEngine(spoil=spoil)), row_retries=0) as pool:
        all_right(ask(pool, 0), 0)
        assert pool.stats.busy_replies == 1
    assert times[1] - times[0] >= 0.4


def test_a_row_refused_by_a_full_queue_goes_to_another_server() -> None:
    first = Server("a", SmallEngine(num_slots=1), max_queued_rows=1)
    first.engine.hold(0)
    second = Server("b")
    servers = ChangingServers(first)
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0, 1, 2, 3)
        eventually(lambda: pool.stats.busy_replies > 0)
        servers.change(add=(second,))
        for answer, position in zip(answers[2:], (2, 3), strict=True):
            right(answer, small_row(position))
        first.engine.let_go(0)
        all_right(answers[:2], 0, 1)


def test_a_bug_in_a_connection_goes_to_whoever_waits() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        raise ZeroDivisionError("a bug")

    with pool_of(Server("a", SmallEngine(spoil=spoil))) as pool:
        with pytest.raises(ZeroDivisionError, match="a bug") as caught:
            ask(pool, 0)[0].result(10)
        assert caught.value.__notes__ == ["row at position 0, features 'training', a"]


def test_a_bug_while_a_server_joins_goes_to_whoever_waits() -> None:
    first, second = held("a", 0), Server("b")
    second.refuses = ZeroDivisionError("a bug")
    servers = ChangingServers(first)
    with pool_of(first, second, listed=servers) as pool:
        answers = ask(pool, 0)
        servers.change(add=(second,))
        with pytest.raises(ZeroDivisionError):
            answers[0].result(10)
        with pytest.raises(ZeroDivisionError):
            ask(pool, 1)
        first.engine.let_go(0)


# ---- the end


def test_closing_answers_rows_that_wait_rows_that_are_out_and_rows_to_be_asked_later() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        if request.position == 1:
            raise ServerBusyError("the queue is full", retry_after_s=20)
        return features

    engine = SmallEngine(num_threads=3, spoil=spoil)
    engine.hold(0)
    server = Server("a", engine)
    with pool_of(server) as pool:
        answers = ask(pool, 0, 1)
        eventually(lambda: pool.stats.busy_replies == 1)
        answers += ask(pool, 2)
        closer = threading.Thread(target=pool.close)
        closer.start()
        for answer in answers:
            with pytest.raises(StoppedError):
                answer.result(2)
        closer.join(3)
        assert not closer.is_alive()
        engine.let_go(0)


def test_closing_is_not_held_up_by_a_server_that_does_not_answer() -> None:
    let_go = threading.Event()
    server = Server("a")
    pool = FeaturePool(FixedServers({"a": server.connect}), SPECS, PoolConfig())
    close = server.open[0].close

    def slow_close() -> None:
        let_go.wait(30)
        close()

    server.open[0].close = slow_close
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 4
    let_go.set()
    eventually(lambda: not server.open)
    server.close()
