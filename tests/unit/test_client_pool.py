"""The pool spreads rows, asks again for lost ones, and answers each exactly once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from feature_path import SPECS, fixed, local_connection, open_pool
from paceline.client.pool import FeaturePool
from paceline.config.placement import PoolConfig
from paceline.errors import (
    CaptureMismatchError,
    ConfigError,
    HandshakeError,
    OutOfMemoryError,
    StoppedError,
    TransportError,
)
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.rows import RowRequest, request_features
from paceline.target.admission import Admission
from paceline.transport.base import Delivery
from small_engine import SmallEngine, expected_hidden, small_info, small_row


def request(position: int, spec: str = "training") -> RowRequest:
    return request_features(small_row(position), spec)


def take(answer: Future[Delivery]) -> Features:
    return answer.result(10).take()


def test_a_row_comes_back_with_its_own_features() -> None:
    with open_pool(SmallEngine()) as pool:
        features = take(pool.submit(request(3)))
        assert features.hidden.equal(expected_hidden(small_row(3).tokens, (1, 3)))
        assert pool.stats.rows_received == 1
        assert pool.stats.bytes_received == features.num_bytes


def test_features_are_handed_over_without_a_copy() -> None:
    left_the_engine = []

    def spoil(request: RowRequest, features: Features) -> Features:
        left_the_engine.append(features.hidden.data_ptr())
        return features

    with open_pool(SmallEngine(spoil=spoil)) as pool:
        assert take(pool.submit(request(0))).hidden.data_ptr() == left_the_engine[0]


def test_a_row_goes_to_the_server_with_the_least_work_outstanding() -> None:
    engines = [SmallEngine(), SmallEngine()]
    long, short = 0, 1
    engines[0].hold(long)
    engines[1].hold(short)
    with open_pool(engines) as pool:
        answers = [pool.submit(request_features(small_row(long, num_tokens=40), "training"))]
        answers += [pool.submit(request_features(small_row(i, num_tokens=5), "training")) for i in (1, 2, 3)]
        engines[0].let_go(long)
        engines[1].let_go(short)
        for answer in answers:
            take(answer)
    assert [len(engine.submitted) for engine in engines] == [1, 3]


def test_servers_with_nothing_to_do_take_turns() -> None:
    """Trainers that ask for one row at a time would all ask the first, each seeing its own rows alone."""
    engines = [SmallEngine(), SmallEngine(), SmallEngine()]
    with open_pool(engines) as pool:
        for i in range(6):
            take(pool.submit(request(i)))
    assert [len(engine.submitted) for engine in engines] == [2, 2, 2]


@pytest.mark.parametrize("fault", ["damaged", "unreachable"])
def test_a_lost_row_is_asked_for_again_and_counted(fault: str) -> None:
    engine = SmallEngine()
    with open_pool(engine, faults={4: [fault, fault]}) as pool:
        assert take(pool.submit(request(4))).hidden.equal(expected_hidden(small_row(4).tokens, (1, 3)))
        assert pool.stats.rows_retried == 2
        assert pool.stats.rows_received == 1


def test_a_row_lost_too_often_is_an_error_that_says_so() -> None:
    with open_pool(SmallEngine(), faults={4: ["damaged"] * 6}) as pool:
        with pytest.raises(TransportError, match=r"row 4 was lost 6 times .*5 times at most.*server-0: checksum 12ab"):
            take(pool.submit(request(4)))
        assert pool.stats.rows_retried == 5
        assert take(pool.submit(request(4))).finite  # the seventh attempt


def test_a_row_lost_by_one_server_is_asked_of_another() -> None:
    engines = [SmallEngine(), SmallEngine()]
    with open_pool(engines, faults={4: ["damaged"] * 6}) as pool:
        assert take(pool.submit(request(4))).finite
    assert [engine.submitted for engine in engines] == [[("training", 4)], [("training", 4)]]


def test_a_busy_server_is_asked_later_and_that_is_no_retry() -> None:
    with open_pool(SmallEngine(), faults={4: ["busy"] * 3}, row_retries=0) as pool:
        assert take(pool.submit(request(4))).finite
        assert pool.stats.busy_replies == 3
        assert pool.stats.rows_retried == 0


def test_an_intact_wrong_reply_is_fatal_and_never_asked_for_again() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        features.hidden = features.hidden[:-1]
        return features

    engine = SmallEngine(spoil=spoil)
    with open_pool(engine) as pool:
        num_tokens = small_row(4).num_tokens
        with pytest.raises(CaptureMismatchError, match=f"{num_tokens - 1} tokens, {num_tokens} were sent"):
            take(pool.submit(request(4)))
        assert pool.stats.rows_retried == 0
    assert len(engine.submitted) == 1
    assert sum(engine.live.values()) == 0, "its memory is free"


def test_another_rows_features_are_never_taken_for_this_rows() -> None:
    spare: dict[int, Features] = {}

    def spoil(request: RowRequest, features: Features) -> Features:
        spare[request.position] = features
        return spare[0]

    with open_pool(SmallEngine(spoil=spoil)) as pool:
        first = request_features(small_row(0, num_tokens=6), "training")
        second = request_features(small_row(1, num_tokens=6), "training")
        assert take(pool.submit(first)).row_hash == first.row_hash()
        with pytest.raises(CaptureMismatchError, match=f"{first.row_hash()}, {second.row_hash()} was sent"):
            take(pool.submit(second))


def test_an_error_of_the_engine_keeps_its_class_and_tells_the_row() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        raise OutOfMemoryError("lower data.row_tokens")

    with open_pool(SmallEngine(spoil=spoil)) as pool:
        with pytest.raises(OutOfMemoryError, match=r"lower data\.row_tokens") as caught:
            take(pool.submit(request(4)))
        assert caught.value.__notes__ == ["row at position 4, features 'training', server-0"]


def test_a_reply_told_twice_is_used_once_and_counted() -> None:
    with open_pool(SmallEngine(), faults={4: ["twice"]}) as pool:
        features = take(pool.submit(request(4)))
        assert features.hidden.equal(expected_hidden(small_row(4).tokens, (1, 3)))
        assert pool.stats.rows_received == 1
        assert pool.stats.late_replies == 1


def test_closing_fails_the_rows_still_out_and_drops_what_comes_late() -> None:
    engine = SmallEngine()
    engine.hold(4)
    admission = Admission(engine)
    pool = FeaturePool(fixed(local_connection(admission)), SPECS, PoolConfig())
    answer = pool.submit(request(4))
    while not engine.submitted:
        time.sleep(0.001)
    closer = threading.Thread(target=pool.close)
    closer.start()
    with pytest.raises(StoppedError, match="before row 4 came"):
        answer.result(10)
    closer.join()
    engine.let_go(4)
    while not pool.stats.late_replies:
        time.sleep(0.001)
    assert pool.stats.rows_received == 0
    while sum(engine.live.values()):  # the late reply's memory is free
        time.sleep(0.001)
    with pytest.raises(StoppedError):
        pool.submit(request(5))
    admission.close()
    engine.close()


def test_features_nobody_registered_are_refused() -> None:
    with open_pool(SmallEngine()) as pool, pytest.raises(ConfigError, match="'other'; there are evaluation, training"):
        pool.submit(request(0, "other"))


def test_a_server_of_another_target_is_refused_before_any_session_is_open() -> None:
    engines = [SmallEngine(), SmallEngine(info=small_info(weight_fingerprint="w2"))]
    admissions = [Admission(engine, max_sessions=1) for engine in engines]

    def open_these(num_servers: int, specs: dict[str, FeatureSpec] = SPECS, **expected: object) -> FeaturePool:
        connections = [local_connection(admission, f"server-{i}") for i, admission in enumerate(admissions)]
        return FeaturePool(fixed(*connections[:num_servers]), specs, PoolConfig(), small_info(**expected))

    with pytest.raises(HandshakeError, match="weight_fingerprint: server-1 has 'w2', this run expects 'w'"):
        open_these(2)
    with pytest.raises(HandshakeError, match="weight_fingerprint: server-0 has 'w', this run expects 'w3'"):
        open_these(1, weight_fingerprint="w3")
    with pytest.raises(HandshakeError, match=r"layers \[6\]"):
        open_these(1, {"training": FeatureSpec((6,))})
    open_these(1).close()  # no session was left behind
    for admission, engine in zip(admissions, engines, strict=True):
        admission.close()
        engine.close()
