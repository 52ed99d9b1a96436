"""Rows by gloo between two processes: bit-equal in any order of headers; whatever dies or is lost, nothing hangs."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2p_peer import Peer, Session, features_of, is_equal, session_on
from paceline.errors import CaptureMismatchError, TransportError
from paceline.schema.layout import layout_bytes
from paceline.transport.base import Incoming
from paceline.transport.feature_bytes import describe

SHORT_S = 1.0
LARGE = {"num_tokens": 4096, "hidden_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p2p")


@pytest.fixture(scope="module")
def peer(folder: Path) -> Iterator[Peer]:
    peer = Peer(folder)
    yield peer
    peer.kill()


@pytest.fixture
def mortal(folder: Path) -> Iterator[Peer]:
    """A peer of the test's own."""
    peer = Peer(folder)
    yield peer
    peer.kill(signal.SIGCONT)
    peer.kill()


def assert_no_thread_is_left(peer: Peer | None = None, within_s: float = 2.0) -> None:
    """In this process, or in the peer's."""
    deadline = time.monotonic() + within_s
    while left := [name for name in names_of_threads(peer) if "gloo" in name or "channel" in name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def names_of_threads(peer: Peer | None) -> list[str]:
    return [thread.name for thread in threading.enumerate()] if peer is None else peer.call("threads")


def assert_arrives(session: Session, position: int, **shape: int) -> None:
    assert is_equal(features_of(position, **shape), session.row(position, **shape))


def assert_lost(session: Session, position: int, within_s: float, **shape: int) -> TransportError:
    since = time.monotonic()
    with pytest.raises(TransportError) as caught:
        session.row(position, **shape)
    assert time.monotonic() - since < within_s
    return caught.value


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_row_arrives_bit_equal_in_every_dtype(peer: Peer, position: int) -> None:
    with session_on(peer, f"dtype-{position}") as session:
        assert_arrives(session, position)
        assert_arrives(session, position, num_tokens=1)
        assert_arrives(session, position, **LARGE)


def test_200_rows_four_deep_arrive_bit_equal_whatever_the_order_of_their_headers(peer: Peer) -> None:
    order: list[int] = []

    def fetch(session: Session, position: int) -> bool:
        shape = {"num_tokens": 1 + 37 * position % 301}
        header = session.header(position, **shape)
        time.sleep(random.random() / 100)  # headers overtake each other
        order.append(header.channel_number)
        return is_equal(features_of(position, **shape), session.receive(header, **shape))

    with session_on(peer, "many") as session, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda position: fetch(session, position), range(200)))
    assert order != sorted(order), "the premise"
    assert sorted(order) == list(range(200)), "all on one communicator"


def test_two_sessions_on_one_server_do_not_meet(peer: Peer) -> None:
    with session_on(peer, "left") as left, session_on(peer, "right") as right, ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda n: ((left, right)[n % 2].row(n), n), range(40)))
    assert all(is_equal(features_of(position), row) for row, position in rows)


def test_a_row_nobody_wants_is_thrown_away_and_the_next_arrives(peer: Peer) -> None:
    with session_on(peer, "unwanted") as session:
        session.receiver.drop(session.header(0))
        assert_arrives(session, 1)
        assert session.header(2).channel_epoch == 1


def test_a_header_that_never_comes_costs_its_epoch_and_not_the_session(peer: Peer) -> None:
    with session_on(peer, "lost header", SHORT_S) as session:
        assert_arrives(session, 0)
        lost = session.header(1)
        assert "did not come" in str(assert_lost(session, 2, within_s=4 * SHORT_S))
        assert_arrives(session, 3)
        assert session.header(4).channel_epoch > lost.channel_epoch


def test_a_reply_known_to_be_lost_costs_no_timeout(peer: Peer) -> None:
    with session_on(peer, "lost reply", stall_timeout_s=60) as session:
        assert_arrives(session, 0)
        since = time.monotonic()
        for position in range(1, 9, 2):
            session.header(position)
            session.receiver.lost(position)
            assert_arrives(session, position + 1)
        assert time.monotonic() - since < 10


def test_a_reply_lost_before_the_channel_is_open_costs_no_timeout(peer: Peer) -> None:
    since = time.monotonic()
    with session_on(peer, "lost first", stall_timeout_s=60) as session:
        session.header(0)
        session.receiver.lost(0)
        assert_arrives(session, 1)
    assert time.monotonic() - since < 10


def test_a_header_that_the_server_could_not_send_costs_the_epoch_at_once(peer: Peer) -> None:
    with session_on(peer, "unsent header", stall_timeout_s=60) as session:
        assert_arrives(session, 0)
        failed = session.header(1, op="row that cannot be sent")
        assert_arrives(session, 2)
        assert session.header(3).channel_epoch > failed.channel_epoch


def test_a_client_that_takes_nothing_is_sent_a_bounded_number_of_rows(peer: Peer) -> None:
    with session_on(peer, "greedy", SHORT_S) as session:
        session.receiver.connect()
        since = time.monotonic()
        headers = [session.header(position) for position in range(5)]
        assert time.monotonic() - since > SHORT_S / 2, "the fifth waited for a place"
        assert {header.channel_epoch for header in headers[:4]} == {1}
        assert headers[4].channel_epoch > 1
        assert is_equal(features_of(4), session.receive(headers[4]))


def test_a_reply_of_another_size_is_fatal_and_names_both(peer: Peer) -> None:
    with session_on(peer, "size") as session:
        header = session.header(0, num_tokens=8)
        _, layout = describe(0, features_of(0, num_tokens=16))
        buffer = session.receiver.reserve(layout_bytes(layout))
        with pytest.raises(CaptureMismatchError, match=rf"{header.num_bytes} bytes.*{layout_bytes(layout)} were"):
            session.receiver.receive(Incoming(header, layout, buffer, None))
        assert_arrives(session, 1)


def test_closing_a_session_fails_what_waits_and_leaves_no_thread(peer: Peer) -> None:
    session = peer.open("closed", 60)
    session.receiver.connect()
    header = session.header(1)
    failed: list[BaseException] = []

    def wait_for_another() -> None:
        try:
            session.receive(header.model_copy(update={"channel_number": 1}))
        except TransportError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait_for_another)
    waiting.start()
    time.sleep(0.2)
    session.close()
    waiting.join(5)
    assert failed
    assert_no_thread_is_left()
    assert_no_thread_is_left(peer)
    with pytest.raises(TransportError, match="closed"):
        session.receive(header)


def test_a_server_killed_among_rows_fails_them_at_once_and_another_serves_on(mortal: Peer, peer: Peer) -> None:
    with session_on(mortal, "killed", stall_timeout_s=8) as session, ThreadPoolExecutor(4) as pool:
        assert_arrives(session, 0)
        rows = [pool.submit(session.row, position, **LARGE) for position in range(40)]
        rows[5].result()
        mortal.kill()
        since = time.monotonic()
        errors = [row.exception() for row in rows]
        assert time.monotonic() - since < 6
        assert all(error is None or isinstance(error, TransportError) for error in errors)
        assert any(errors)
    with session_on(peer, "after a death") as session:
        assert_arrives(session, 7)
    assert_no_thread_is_left(within_s=10)


def test_a_server_that_hangs_is_given_up_in_time_and_serves_on_when_it_wakes(mortal: Peer) -> None:
    with session_on(mortal, "hangs", SHORT_S) as session:
        assert_arrives(session, 0)
        headers = [session.header(position, **LARGE) for position in range(3)]
        mortal.kill(signal.SIGSTOP)
        since = time.monotonic()
        with pytest.raises(TransportError):
            _ = [session.receive(header, **LARGE) for header in headers]
        assert time.monotonic() - since < 5 * SHORT_S
        mortal.kill(signal.SIGCONT)
        for attempt in range(5):
            try:
                assert_arrives(session, 3)
                break
            except TransportError:
                assert attempt < 4
        assert_arrives(session, 4)


def test_a_client_killed_among_rows_leaves_nothing_in_the_server(peer: Peer) -> None:
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    child = context.Process(target=ask_for_ever, args=(peer._address, started), daemon=True)
    child.start()
    assert started.wait(30)
    child.kill()
    child.join()
    peer.call("close", "doomed")
    assert_no_thread_is_left(peer)
    with session_on(peer, "after a client's death") as session:
        assert_arrives(session, 0)


def ask_for_ever(address: str, started: threading.Event) -> None:
    peer = Peer.__new__(Peer)
    peer.kind, peer._address, peer._own = "gloo", address, threading.local()
    session = peer.open("doomed", 60)
    for position in range(1_000_000):
        session.row(position, **LARGE)
        started.set()


def test_nobody_but_this_host_can_reach_the_channel(peer: Peer) -> None:
    with session_on(peer, "loopback") as session:
        assert_arrives(session, 0)
        inodes = {
            link.readlink().name.removeprefix("socket:[").rstrip("]")
            for link in Path(f"/proc/{peer.pid}/fd").iterdir()
            if "socket" in str(link.readlink())
        }
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = [fields[1].split(":")[0] for fields in sockets if fields[9] in inodes and fields[3] == "0A"]
        assert listening, "the premise: gloo listens"
        assert set(listening) == {"0100007F"}
