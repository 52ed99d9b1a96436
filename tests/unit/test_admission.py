"""Admission: sessions in turn, bounded queues, an orderly end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from paceline.errors import CaptureMismatchError, ConfigError, ServerBusyError, StoppedError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.limits import Limits
from paceline.schema.rows import RowRequest, request_features
from paceline.target.admission import Admission
from small_engine import SmallEngine, expected_hidden, small_row

SPECS = {"training": FeatureSpec((1, 3)), "evaluation": FeatureSpec((2,), greedy=True)}


@pytest.fixture
def engine() -> Iterator[SmallEngine]:
    engine = SmallEngine(num_slots=1)
    yield engine
    engine.close()


@pytest.fixture
def admission(engine: SmallEngine) -> Iterator[Admission]:
    admission = Admission(engine, max_queued_rows=8, max_sessions=3)
    yield admission
    admission.close()


def request(position: int, spec: str = "training") -> RowRequest:
    return request_features(small_row(position), spec)


def wait_until_submitted(engine: SmallEngine, position: int) -> None:
    deadline = time.monotonic() + 10
    while ("training", position) not in engine.submitted:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_each_row_gets_the_features_its_session_registered(admission: Admission) -> None:
    session = admission.open_session(SPECS)
    training, evaluation = request(3), request(4, "evaluation")
    first, second = admission.submit(session, training), admission.submit(session, evaluation)
    assert first.result(10).layers == (1, 3)
    assert first.result(10).hidden.equal(expected_hidden(training.tokens, (1, 3)))
    assert second.result(10).hidden.equal(expected_hidden(evaluation.tokens, (2,)))
    assert second.result(10).greedy is not None


def test_two_sessions_of_different_specs_under_one_name_do_not_mix(admission: Admission) -> None:
    first = admission.open_session({"training": FeatureSpec((0,))})
    second = admission.open_session({"training": FeatureSpec((5,))})
    assert admission.submit(first, request(0)).result(10).layers == (0,)
    assert admission.submit(second, request(0)).result(10).layers == (5,)


def test_sessions_take_turns_whatever_one_has_queued(engine: SmallEngine, admission: Admission) -> None:
    deep, shallow = admission.open_session(SPECS), admission.open_session(SPECS)
    engine.hold(0)
    rows = [admission.submit(deep, request(0))]
    wait_until_submitted(engine, 0)
    rows += [admission.submit(deep, request(position)) for position in range(1, 7)]
    rows += [admission.submit(shallow, request(position)) for position in (100, 101)]
    engine.let_go(0)
    for row in rows:
        row.result(10)
    assert [position for _, position in engine.submitted] == [0, 1, 100, 2, 101, 3, 4, 5, 6]


def test_the_engine_never_gets_more_rows_than_it_has_room_for() -> None:
    engine = SmallEngine(num_threads=4, num_slots=3, delay_s=lambda request: 0.002)
    admission = Admission(engine)
    session = admission.open_session(SPECS)
    for row in [admission.submit(session, request(position)) for position in range(30)]:
        row.result(10)
    assert engine.most_computing == 3
    admission.close()
    engine.close()


def test_a_full_queue_refuses_rows_of_that_session_alone(engine: SmallEngine, admission: Admission) -> None:
    deep, other = admission.open_session(SPECS), admission.open_session(SPECS)
    engine.hold(0)
    admission.submit(deep, request(0))
    wait_until_submitted(engine, 0)
    rows = [admission.submit(deep, request(position)) for position in range(1, 9)]
    assert admission.num_queued_rows() == 8
    with pytest.raises(ServerBusyError, match="8 rows of session-0 are waiting, 8 are allowed"):
        admission.submit(deep, request(9))
    rows.append(admission.submit(other, request(20)))
    engine.let_go(0)
    for row in rows:
        row.result(10)


def test_sessions_are_bounded_and_a_closed_one_makes_room(admission: Admission) -> None:
    sessions = [admission.open_session(SPECS) for _ in range(3)]
    with pytest.raises(ServerBusyError, match="3 sessions are open, 3 are allowed"):
        admission.open_session(SPECS)
    admission.close_session(sessions[0])
    admission.open_session(SPECS)


def test_closing_a_session_fails_its_waiting_rows_and_no_others(engine: SmallEngine, admission: Admission) -> None:
    leaving, staying = admission.open_session(SPECS), admission.open_session(SPECS)
    engine.hold(0)
    in_engine = admission.submit(leaving, request(0))
    wait_until_submitted(engine, 0)
    waiting, other = admission.submit(leaving, request(1)), admission.submit(staying, request(2))
    admission.close_session(leaving)
    with pytest.raises(StoppedError, match="session-0 was closed"):
        waiting.result(10)
    engine.let_go(0)
    assert in_engine.result(10).finite
    assert other.result(10).finite
    assert ("training", 1) not in engine.submitted
    with pytest.raises(StoppedError, match="session-0 is closed"):
        admission.submit(leaving, request(3))


def test_closing_fails_what_waits_and_refuses_what_comes(engine: SmallEngine, admission: Admission) -> None:
    session = admission.open_session(SPECS)
    engine.hold(0)
    in_engine = admission.submit(session, request(0))
    wait_until_submitted(engine, 0)
    waiting = admission.submit(session, request(1))
    admission.close()
    with pytest.raises(StoppedError, match="closed"):
        waiting.result(10)
    with pytest.raises(StoppedError):
        admission.submit(session, request(2))
    engine.let_go(0)
    assert in_engine.result(10).finite
    admission.close()


def test_queued_time_is_told_with_the_features(engine: SmallEngine, admission: Admission) -> None:
    session = admission.open_session(SPECS)
    engine.hold(0)
    first = admission.submit(session, request(0))
    wait_until_submitted(engine, 0)
    second = admission.submit(session, request(1))
    time.sleep(0.1)
    engine.let_go(0)
    assert first.result(10).queued_s < second.result(10).queued_s
    assert second.result(10).queued_s >= 0.1


def test_a_row_given_up_while_it_waits_never_reaches_the_engine(engine: SmallEngine, admission: Admission) -> None:
    session = admission.open_session(SPECS)
    engine.hold(0)
    admission.submit(session, request(0))
    wait_until_submitted(engine, 0)
    given_up, last = admission.submit(session, request(1)), admission.submit(session, request(2))
    assert given_up.cancel()
    engine.let_go(0)
    last.result(10)
    assert [position for _, position in engine.submitted] == [0, 2]


def test_what_cannot_be_served_is_refused_by_name(admission: Admission) -> None:
    with pytest.raises(ConfigError, match=r"capture layers \[6\], small has 0..5"):
        admission.open_session({"training": FeatureSpec((1, 6))})
    session = admission.open_session(SPECS)
    with pytest.raises(ConfigError, match="'other', session-0 registered evaluation, training"):
        admission.submit(session, request(0, "other"))


def test_a_session_asks_only_for_layers_that_the_engine_was_started_for() -> None:
    class Started(SmallEngine):
        def limits(self) -> Limits:
            return Limits(layers=(0, 1))

    engine = Started()
    admission = Admission(engine)
    admission.open_session({"training": FeatureSpec((0, 1))})
    with pytest.raises(ConfigError, match=r"'training' ask for capture layers \[2, 3\], .* started for \[0, 1\]"):
        admission.open_session({"training": FeatureSpec((1, 2, 3))})
    admission.close()
    engine.close()


def test_an_error_of_the_engine_fails_its_row_alone() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        if request.position == 1:
            raise CaptureMismatchError("token 999 is outside the vocabulary")
        return features

    engine = SmallEngine(spoil=spoil)
    admission = Admission(engine)
    session = admission.open_session(SPECS)
    rows = [admission.submit(session, request(position)) for position in range(3)]
    with pytest.raises(CaptureMismatchError, match="999"):
        rows[1].result(10)
    assert rows[0].result(10).finite
    assert rows[2].result(10).finite
    admission.close()
    engine.close()


def test_an_engine_that_breaks_its_contract_fails_all_waiting_rows_loudly(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenEngine(SmallEngine):
        def room(self) -> int:
            raise RuntimeError("the device is gone")

    engine = BrokenEngine()
    quiet, threading.excepthook = threading.excepthook, lambda args: None
    try:
        admission = Admission(engine)
        session = admission.open_session(SPECS)
        with pytest.raises(RuntimeError, match="the device is gone"):
            admission.submit(session, request(0)).result(10)
        admission.close()
    finally:
        threading.excepthook = quiet
    assert "the device is gone" in caplog.text
    with pytest.raises(StoppedError):
        admission.submit(session, request(1))
    engine.close()


def test_many_threads_submit_at_once_and_each_gets_its_own_answer() -> None:
    engine = SmallEngine(num_threads=3, num_slots=4)
    admission = Admission(engine)
    wrong: list[int] = []

    def ask(session: str, base: int) -> None:
        asked = [request(base + i) for i in range(20)]
        answers = [admission.submit(session, row) for row in asked]
        wrong.extend(
            row.position
            for row, answer in zip(asked, answers, strict=True)
            if not answer.result(10).hidden.equal(expected_hidden(row.tokens, (1, 3)))
        )

    threads = [threading.Thread(target=ask, args=(admission.open_session(SPECS), 100 * i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.submitted) == 120
    assert wrong == []
    admission.close()
    engine.close()
