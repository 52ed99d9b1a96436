"""Rows of groups: computed once for all members, kept within bounds, and nobody waits for what will never come."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest

from paceline.errors import ConfigError, ServerBusyError, StoppedError, TargetError, WireError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.parts import Part
from paceline.schema.rows import RowRequest, request_features
from paceline.target.admission import Admission
from paceline.target.groups import GroupMember, KeptBounds, RowGroups
from small_engine import SmallEngine, expected_hidden, small_row

SPECS = {"training": FeatureSpec((1, 3), final_hidden="supervised", greedy=True)}
KEY, OTHER = "ab" * 16, "cd" * 16


@contextmanager
def groups_of(
    engine: SmallEngine, bounds: KeptBounds | None = None, max_queued_rows: int = 64
) -> Iterator[tuple[RowGroups, Admission]]:
    """Closed with their engine; what was captured is counted by the engine itself."""
    admission = Admission(engine)
    try:
        yield RowGroups(admission, bounds or KeptBounds(), max_queued_rows, lambda captured: None), admission
    finally:
        engine.close()
        admission.close()


def ask(position: int, index: int, count: int = 2, num_tokens: int | None = None) -> RowRequest:
    row = small_row(position, num_tokens=num_tokens)
    return request_features(row, "training", part=Part(index, count))


def is_right(answer: Future[Features], position: int, num_tokens: int | None = None) -> bool:
    """Whether it is the whole row, from which the part is cut later."""
    tokens = small_row(position, num_tokens=num_tokens).tokens
    return answer.result(10).hidden.equal(expected_hidden(tokens, (1, 3)))


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.002)


@pytest.mark.parametrize("num_members", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_is_computed_once_in_whatever_order_its_parts_are_asked_for(num_members: int, seed: int) -> None:
    engine = SmallEngine(num_threads=2, delay_s=lambda request: 0.001 * (request.position % 3))
    wrong: list[int] = []
    with groups_of(engine) as (groups, _):
        gate = threading.Barrier(num_members)

        def go_through(member: GroupMember, index: int) -> None:
            order = list(range(30))
            random.Random(seed + index).shuffle(order)
            gate.wait()
            for start in range(0, 30, 4):
                some = order[start : start + 4]
                answers = [(position, member.submit(ask(position, index, num_members))) for position in some]
                wrong.extend(position for position, answer in answers if not is_right(answer, position))

        members = [groups.join(KEY, SPECS) for _ in range(num_members)]
        threads = [threading.Thread(target=go_through, args=(one, index)) for index, one in enumerate(members)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == []
        assert sorted(position for _, position in engine.submitted) == list(range(30))
        assert (groups.num_kept_rows(), groups.num_kept_bytes()) == (0, 0)


def test_a_row_lives_no_longer_than_its_last_part() -> None:
    """Not until the garbage collector finds it."""
    engine = SmallEngine()
    gc.disable()
    try:
        with groups_of(engine) as (groups, _):
            first, second = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
            for position in range(10):
                answers = [first.submit(ask(position, 0)), second.submit(ask(position, 1))]
                assert all(is_right(answer, position) for answer in answers)
            del answers
            eventually(lambda: engine.live["training"] == 0)
            assert is_right(first.submit(ask(10, 0)), 10)
            assert groups.num_kept_bytes() == engine.live_bytes > 0
            assert is_right(second.submit(ask(10, 1)), 10)
            eventually(lambda: engine.live["training"] == 0)
    finally:
        gc.enable()


def test_a_part_that_is_asked_for_twice_is_given_twice() -> None:
    engine = SmallEngine()
    with groups_of(engine) as (groups, _):
        first, second = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
        for _ in range(3):
            assert is_right(first.submit(ask(0, 0)), 0)
        assert is_right(second.submit(ask(0, 1)), 0)
        assert len(engine.submitted) == 1
        assert is_right(first.submit(ask(0, 0)), 0)  # all parts were given out: it is computed once more
        assert len(engine.submitted) == 2


def test_who_waits_for_a_row_that_is_queued_takes_no_place_in_the_queue() -> None:
    engine = SmallEngine(num_slots=1)
    engine.hold(0)
    with groups_of(engine, max_queued_rows=1) as (groups, admission):
        members = [groups.join(KEY, SPECS) for _ in range(3)]
        answers = [members[0].submit(ask(0, 0, 3))]
        eventually(lambda: len(engine.submitted) == 1)
        answers += [members[1].submit(ask(1, 1, 3))]
        with pytest.raises(ServerBusyError, match="1 rows"):
            members[2].submit(ask(2, 2, 3))
        answers += [member.submit(ask(1, index, 3)) for index, member in enumerate(members) if index != 1]
        assert admission.num_queued_rows() == 1
        engine.let_go(0)
        assert all(is_right(answer, position) for answer, position in zip(answers, (0, 1, 1, 1), strict=True))


def test_a_group_takes_one_turn_however_many_sessions_it_has() -> None:
    engine = SmallEngine(num_slots=1)
    engine.hold(0)
    with groups_of(engine) as (groups, admission):
        members = [groups.join(KEY, SPECS) for _ in range(4)]
        alone = admission.open_session(SPECS)
        answers = [members[0].submit(ask(0, 0, 4))]
        eventually(lambda: len(engine.submitted) == 1)
        answers += [member.submit(ask(10 + row, index, 4)) for row in range(4) for index, member in enumerate(members)]
        answers += [admission.submit(alone, request_features(small_row(20 + row), "training")) for row in range(4)]
        engine.let_go(0)
        for answer in answers:
            answer.result(10)
        assert [position for _, position in engine.submitted] == [0, 10, 20, 11, 21, 12, 22, 13, 23]


def test_a_member_that_leaves_takes_along_only_what_nobody_else_waits_for() -> None:
    engine = SmallEngine(num_slots=1)
    engine.hold(0)
    with groups_of(engine) as (groups, _):
        leaving, staying = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
        shared = [leaving.submit(ask(0, 0)), staying.submit(ask(0, 1))]
        eventually(lambda: len(engine.submitted) == 1)
        own, both = leaving.submit(ask(1, 0)), leaving.submit(ask(2, 0))
        kept = staying.submit(ask(2, 1))
        leaving.close()
        leaving.close()
        for answer in (shared[0], own, both):
            with pytest.raises(StoppedError, match="the session was closed"):
                answer.result(5)
        with pytest.raises(StoppedError, match="row 3 is not taken"):
            leaving.submit(ask(3, 0))
        engine.let_go(0)
        assert is_right(shared[1], 0)
        assert is_right(kept, 2)
        assert [position for _, position in engine.submitted] == [0, 2]


def test_a_row_that_nobody_waits_for_any_more_never_reaches_the_engine() -> None:
    engine = SmallEngine(num_slots=1)
    engine.hold(0)
    with groups_of(engine) as (groups, admission):
        first, second = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
        running = first.submit(ask(0, 0))
        eventually(lambda: len(engine.submitted) == 1)
        answers = [first.submit(ask(1, 0)), second.submit(ask(1, 1))]
        assert answers[0].cancel()
        assert admission.num_queued_rows() == 1
        assert answers[1].cancel()
        again = second.submit(ask(2, 1))
        engine.let_go(0)
        assert is_right(running, 0)
        assert is_right(again, 2)
        assert [position for _, position in engine.submitted] == [0, 2]
        assert is_right(first.submit(ask(1, 0)), 1)


def test_what_is_kept_ends_with_the_last_session_of_the_group() -> None:
    engine = SmallEngine(num_threads=2)
    engine.hold(5)
    with groups_of(engine) as (groups, admission):
        first, second = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
        for position in range(3):
            assert is_right(first.submit(ask(position, 0)), position)
        running = second.submit(ask(5, 1))
        eventually(lambda: len(engine.submitted) == 4)
        first.close()
        assert groups.num_kept_rows() == 3
        second.close()
        assert groups.num_kept_rows() == 0
        with pytest.raises(StoppedError):
            running.result(5)
        engine.let_go(5)
        eventually(lambda: engine.live["training"] == 0)
        assert groups.num_kept_rows() == 0
        assert admission.num_queued_rows() == 0
        anew = groups.join(KEY, {"training": FeatureSpec((0,))})  # it knows nothing of the group before it
        assert anew.submit(ask(0, 0, 4)).result(10).layers == (0,)


def test_what_is_kept_is_bounded_in_rows_bytes_and_time() -> None:
    num_bytes = 4 * 100 * (2 * 8 + 1 + 9)
    for bounds, most in (
        (KeptBounds(num_rows=3), 3),
        (KeptBounds(num_bytes=2 * num_bytes), 2),
        (KeptBounds(num_bytes=1), 1),  # a row that is larger is kept alone
    ):
        engine = SmallEngine()
        with groups_of(engine, bounds) as (groups, _):
            first, second = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
            for position in range(8):
                first.submit(ask(position, 0, num_tokens=100)).result(10)
                eventually(lambda: engine.live["training"] <= most)  # noqa: B023 - called before the next is begun
                assert groups.num_kept_rows() == min(most, position + 1)
                assert groups.num_kept_bytes() <= max(bounds.num_bytes, num_bytes)
            assert is_right(second.submit(ask(7, 1, num_tokens=100)), 7, 100)
            assert len(engine.submitted) == 8
            assert is_right(second.submit(ask(0, 1, num_tokens=100)), 0, 100)  # dropped: computed again
            assert len(engine.submitted) == 9
    engine = SmallEngine()
    with groups_of(engine, KeptBounds(seconds=0.2)) as (groups, _):
        member, _ = groups.join(KEY, SPECS), groups.join(KEY, SPECS)
        member.submit(ask(0, 0)).result(10)
        groups.drop_stale()
        assert groups.num_kept_rows() == 1
        time.sleep(0.25)
        groups.drop_stale()
        assert groups.num_kept_rows() == 0


def test_a_group_that_keeps_much_costs_no_other_group_what_it_keeps() -> None:
    engine = SmallEngine()
    with groups_of(engine, KeptBounds(num_rows=4)) as (groups, _):
        greedy, modest = groups.join(KEY, SPECS), groups.join(OTHER, SPECS)
        modest.submit(ask(0, 0)).result(10)
        for position in range(20):
            greedy.submit(ask(position, 0)).result(10)
        assert groups.num_kept_rows() == 4
        assert is_right(groups.join(OTHER, SPECS).submit(ask(0, 1)), 0)
        assert len(engine.submitted) == 21


def test_a_row_that_fails_fails_for_everyone_who_waits_and_is_computed_anew_for_who_asks_again() -> None:
    spoiled = iter([True, False])

    def spoil(request: RowRequest, features: Features) -> Features:
        if next(spoiled):
            raise TargetError("no luck")
        return features

    engine = SmallEngine(spoil=spoil)
    engine.hold(0)
    with groups_of(engine) as (groups, _):
        members = [groups.join(KEY, SPECS) for _ in range(2)]
        answers = [member.submit(ask(0, index)) for index, member in enumerate(members)]
        engine.let_go(0)
        for answer in answers:
            with pytest.raises(TargetError, match="no luck"):
                answer.result(10)
        answers = [member.submit(ask(0, index)) for index, member in enumerate(members)]
        assert all(is_right(answer, 0) for answer in answers)
        assert len(engine.submitted) == 2


def test_groups_share_nothing_with_each_other_and_rows_only_if_they_are_equal() -> None:
    engine = SmallEngine()
    with groups_of(engine) as (groups, _):
        first, second, stranger = groups.join(KEY, SPECS), groups.join(KEY, SPECS), groups.join(OTHER, SPECS)
        assert is_right(first.submit(ask(0, 0)), 0)
        assert is_right(stranger.submit(ask(0, 1)), 0)
        assert len(engine.submitted) == 2
        other_tokens = replace(ask(1, 1), position=0)
        assert is_right(second.submit(other_tokens), 1)
        assert len(engine.submitted) == 3
        assert is_right(second.submit(ask(0, 1)), 0)
        assert len(engine.submitted) == 3


def test_members_that_disagree_are_refused_with_both_sides_named() -> None:
    engine = SmallEngine()
    with groups_of(engine) as (groups, _):
        member = groups.join(KEY, SPECS)
        with pytest.raises(ConfigError, match=r"layers=\(1, 3\).*layers=\(2,\)"):
            groups.join(KEY, {"training": FeatureSpec((2,))})
        member.submit(ask(0, 0)).result(10)
        with pytest.raises(WireError, match="row 0 is asked for in 4 parts, the group's rows have 2"):
            member.submit(ask(0, 0, 4))
        with pytest.raises(ConfigError, match="capture layers"):
            groups.join(OTHER, {"training": FeatureSpec((99,))})
        assert groups.join(OTHER, SPECS).submit(ask(0, 3, 4)).result(10)
