"""Rows by NCCL between two processes on two GPUs: bit-equal, and whatever dies or is lost, nothing hangs."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from p2p_peer import Peer, Session, features_of, is_equal, session_on
from paceline.errors import TransportError
from paceline.schema.layout import layout_bytes
from paceline.transport.base import Incoming
from paceline.transport.feature_bytes import describe

pytestmark = pytest.mark.gpu2
SERVER, TRAINER = "cuda:0", "cuda:1"
SHORT_S = 3.0
LARGE = {"num_tokens": 8192, "hidden_size": 1024}
MILLISECOND = 2_000_000  # clock cycles, about


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert torch.cuda.device_count() >= 2, "these tests need 2 CUDA devices: run them with make gpu-test-2 there"
    return tmp_path_factory.mktemp("p2p")


@pytest.fixture(scope="module")
def peer(folder: Path) -> Iterator[Peer]:
    peer = Peer(folder, "nccl", SERVER)
    yield peer
    peer.kill()


@pytest.fixture
def mortal(folder: Path) -> Iterator[Peer]:
    """A peer of the test's own."""
    peer = Peer(folder, "nccl", SERVER)
    yield peer
    peer.kill(signal.SIGCONT)
    peer.kill()


def open_on(peer: Peer, name: str, stall_timeout_s: float = 60.0):
    return session_on(peer, name, stall_timeout_s, TRAINER)


def assert_arrives(session: Session, position: int, **shape: int) -> None:
    received = session.row(position, **shape)
    assert received.hidden.device == torch.device(TRAINER)
    assert is_equal(features_of(position, **shape), received)


def arrives_again(session: Session, position: int, attempts: int = 5) -> None:
    """After a failure the other side may need another epoch to notice."""
    for attempt in range(attempts):
        try:
            assert_arrives(session, position)
        except TransportError:
            assert attempt < attempts - 1
        else:
            return


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_row_arrives_bit_equal_in_every_dtype(peer: Peer, position: int) -> None:
    with open_on(peer, f"dtype-{position}") as session:
        assert_arrives(session, position)
        assert_arrives(session, position, num_tokens=1)
        assert_arrives(session, position, **LARGE)


def test_200_rows_four_deep_arrive_bit_equal_in_memory_that_is_used_again(peer: Peer) -> None:
    def fetch(session: Session, position: int) -> int:
        shape = {"num_tokens": 512 + 37 * position % 301}
        header = session.header(position, **shape)
        time.sleep(random.random() / 100)  # headers overtake each other
        assert is_equal(features_of(position, **shape), session.receive(header, **shape))
        return header.channel_epoch

    with open_on(peer, "many") as session, ThreadPoolExecutor(4) as pool:
        torch.cuda.reset_peak_memory_stats(TRAINER)
        before = torch.cuda.memory_allocated(TRAINER)
        epochs = set(pool.map(lambda position: fetch(session, position), range(200)))
        assert epochs == {1}, "all on one communicator"
        _, layout = describe(0, features_of(0, num_tokens=512 + 301))
        peak = torch.cuda.max_memory_allocated(TRAINER) - before
        assert peak < 16 * layout_bytes(layout), "4 rows and a copy of each"


def test_two_sessions_on_one_server_do_not_meet(peer: Peer) -> None:
    with open_on(peer, "left") as left, open_on(peer, "right") as right, ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda n: ((left, right)[n % 2].row(n), n), range(40)))
    assert all(is_equal(features_of(position), row) for row, position in rows)


def test_a_row_read_long_after_it_was_released_is_still_right(peer: Peer) -> None:
    """The consumer's stream is behind; what it has queued before the release sees the row, not the next one."""
    wrong = []
    with open_on(peer, "behind") as session, torch.cuda.device(TRAINER):
        expected = [features_of(position, **LARGE).hidden.to(TRAINER) for position in range(6)]
        with torch.cuda.stream(torch.cuda.Stream()):
            for position in range(6):
                layout, buffer = session.buffer(position, **LARGE)
                header = session.header(position, **LARGE)
                delivery = session.receiver.receive(Incoming(header, layout, buffer, None))
                del buffer
                with delivery.inspect():
                    assert delivery.features.final_index is not None
                    assert delivery.features.final_index[-1].item() == 4095
                features = delivery.take()
                torch.cuda._sleep(100 * MILLISECOND)
                wrong.append((features.hidden != expected[position]).any())
                del features
                delivery.release()
        assert not any(bool(one) for one in wrong)


def test_rows_come_while_the_trainers_stream_is_busy(peer: Peer) -> None:
    with open_on(peer, "busy") as session, torch.cuda.device(TRAINER):
        session.receiver.connect()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(3000 * MILLISECOND)
            busy = torch.cuda.current_stream().record_event()
        for position in range(4):
            layout, buffer = session.buffer(position)
            delivery = session.receiver.receive(Incoming(session.header(position), layout, buffer, None))
            with delivery.inspect():
                assert delivery.features.greedy is not None
                delivery.features.greedy.cpu()
            delivery.release()
        assert not busy.query(), "nothing waited for the whole device"


def test_a_row_nobody_wants_is_thrown_away_and_the_next_arrives(peer: Peer) -> None:
    with open_on(peer, "unwanted") as session:
        session.receiver.drop(session.header(0))
        assert_arrives(session, 1)
        assert session.header(2).channel_epoch == 1


def test_a_reply_known_to_be_lost_costs_a_new_communicator_and_no_timeout(peer: Peer) -> None:
    with open_on(peer, "lost reply") as session:
        assert_arrives(session, 0)
        since = time.monotonic()
        for position in range(1, 7, 2):
            session.header(position)
            session.receiver.lost(position)
            assert_arrives(session, position + 1)
        assert time.monotonic() - since < 40


def test_a_header_that_never_comes_costs_its_epoch_and_not_the_session(peer: Peer) -> None:
    with open_on(peer, "lost header", SHORT_S) as session:
        assert_arrives(session, 0)
        session.header(1)
        with pytest.raises(TransportError, match="did not come"):
            session.row(2)
        arrives_again(session, 3)


def test_a_client_that_takes_nothing_is_given_up_and_comes_back(peer: Peer) -> None:
    """The server's send is on the GPU, waiting for the client's receive, when it is given up."""
    with open_on(peer, "idle", SHORT_S) as session:
        assert_arrives(session, 0)
        session.header(1)
        time.sleep(2 * SHORT_S)
        arrives_again(session, 2)


def test_closing_frees_whoever_waits_for_a_row(peer: Peer) -> None:
    session = peer.open("closed", 60, TRAINER)
    session.receiver.connect()
    header = session.header(0).model_copy(update={"channel_number": 1})
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            session.receive(header)
        except TransportError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    session.close()
    waiting.join(10)
    assert failed


def test_a_server_killed_among_rows_fails_them_in_time_and_another_serves_on(mortal: Peer, peer: Peer) -> None:
    with open_on(mortal, "killed", SHORT_S) as session, ThreadPoolExecutor(4) as pool:
        assert_arrives(session, 0)
        rows = [pool.submit(session.row, position, **LARGE) for position in range(20)]
        rows[5].result()
        mortal.kill()
        since = time.monotonic()
        errors = [row.exception() for row in rows]
        assert time.monotonic() - since < 4 * SHORT_S
        assert any(errors)
        assert all(error is None or isinstance(error, TransportError) for error in errors)
    with open_on(peer, "after a death") as session:
        assert_arrives(session, 7)


def test_a_server_that_hangs_is_given_up_in_time_and_serves_on_when_it_wakes(mortal: Peer) -> None:
    with open_on(mortal, "hangs", SHORT_S) as session:
        assert_arrives(session, 0)
        headers = [session.header(position, **LARGE) for position in range(2)]
        time.sleep(0.5)  # the first is on its way, on the GPU
        mortal.kill(signal.SIGSTOP)
        assert is_equal(features_of(0, **LARGE), session.receive(headers[0], **LARGE)), "no host is needed any more"
        since = time.monotonic()
        with pytest.raises(TransportError):
            session.receive(headers[1], **LARGE)
        assert time.monotonic() - since < 5 * SHORT_S
        mortal.kill(signal.SIGCONT)
        arrives_again(session, 3)


def test_the_process_survives_many_epochs_without_growing(peer: Peer) -> None:
    with open_on(peer, "epochs") as session:
        session.receiver.connect()
        used = []
        for position in range(8):
            assert_arrives(session, position)
            session.receiver.lost(position)
            session.receiver.connect()
            free, total = torch.cuda.mem_get_info(TRAINER)
            used.append(total - free)
        assert used[-1] - used[3] < 64 << 20
