"""What every feature stream keeps to: order, bounds, exact positions, exactly once (rules N1, N3, N5, N6)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from feature_path import SPECS, fixed, local_connection, open_pool
from paceline.client.budget import PrefetchBudget
from paceline.client.pool import FeaturePool
from paceline.client.stream import FeatureStream
from paceline.config.placement import PoolConfig
from paceline.errors import CaptureMismatchError, CheckpointError, ConfigError, StoppedError, TransportError
from paceline.schema.features import FeatureRow, Features
from paceline.schema.layout import reply_bytes
from paceline.schema.rows import Row, RowRequest, request_features
from paceline.target.admission import Admission
from small_engine import HIDDEN_SIZE, SmallEngine, expected_hidden, small_info, small_row

NUM_ROWS = 5  # in an epoch of small_row


def training(
    pool: FeaturePool, budget: PrefetchBudget | None = None, stop: int = 12, row_timeout_s: float = 30.0
) -> FeatureStream:
    budget = budget or PrefetchBudget(4, 1 << 20)
    return FeatureStream(small_row, pool, budget, "training", range(stop), row_timeout_s=row_timeout_s)


def open_one(admission: Admission) -> FeaturePool:
    return FeaturePool(fixed(local_connection(admission)), SPECS, PoolConfig())


def held_out_row(position: int) -> Row:
    row: Row = small_row(position, num_rows=100)
    return row


def evaluation(pool: FeaturePool, budget: PrefetchBudget, num_rows: int = 3) -> FeatureStream:
    return FeatureStream(held_out_row, pool, budget, "evaluation", range(num_rows), own_rows=1)


def train(row: FeatureRow) -> int:
    """Stands for forward and backward: reads every number of the row; its position."""
    assert row.features.hidden.equal(expected_hidden(row.row.tokens, row.features.layers))
    return row.row.position


def slowest_first(request: RowRequest) -> float:
    return 0.012 - 0.004 * (request.position % 4)


@pytest.mark.parametrize("prefetch_rows", [1, 2, 4, 7])
def test_rows_come_in_order_whatever_order_they_are_done_in(prefetch_rows: int) -> None:
    engine = SmallEngine(num_threads=4, delay_s=slowest_first)
    with open_pool(engine) as pool:
        trained = [train(row) for row in training(pool, PrefetchBudget(prefetch_rows, 1 << 20))]
    assert trained == list(range(12))
    out_of_order = [position for _, position in engine.answered] != trained
    assert out_of_order == (prefetch_rows > 1)  # the premise: the engine does finish out of order


def test_several_servers_change_nothing_but_who_computes() -> None:
    engines = [SmallEngine(delay_s=slowest_first), SmallEngine(), SmallEngine()]
    with open_pool(engines) as pool:
        assert [train(row) for row in training(pool)] == list(range(12))
    assert all(engine.submitted for engine in engines)


@pytest.mark.parametrize("prefetch_rows", [1, 2, 4])
def test_rows_in_flight_never_exceed_the_bound_and_reach_it(prefetch_rows: int) -> None:
    engine = SmallEngine(num_threads=3, delay_s=lambda request: 0.002)
    with open_pool(engine) as pool:
        for row in training(pool, PrefetchBudget(prefetch_rows, 1 << 20)):
            train(row)
    assert engine.most_live_at_all == prefetch_rows  # counted until the trainer let the tensors go
    assert engine.live["training"] == 0


def row_bytes(position: int) -> int:
    return reply_bytes(request_features(small_row(position), "training"), SPECS["training"], small_info())


def tensor_bytes(position: int) -> int:
    """Without the gaps between tensors, which budgets count."""
    return 4 * small_row(position).num_tokens * len(SPECS["training"].layers) * HIDDEN_SIZE


def test_bytes_in_flight_never_exceed_the_bound() -> None:
    sizes = [row_bytes(position) for position in range(12)]
    max_bytes = max(sizes) * 2
    assert min(sizes) < max(sizes)
    engine = SmallEngine(num_threads=3)
    with open_pool(engine) as pool:
        for row in training(pool, PrefetchBudget(100, max_bytes)):
            train(row)
    assert max_bytes / 2 < engine.most_live_bytes <= max_bytes
    assert engine.most_live_at_all > 1


def test_a_row_larger_than_the_byte_budget_travels_alone() -> None:
    engine = SmallEngine(num_threads=3)
    with open_pool(engine) as pool:
        assert [train(row) for row in training(pool, PrefetchBudget(100, 1))] == list(range(12))
    assert engine.most_live_at_all == 1


def test_prefetch_of_one_asks_for_a_row_only_when_the_one_before_is_trained() -> None:
    engine = SmallEngine()
    with open_pool(engine) as pool:
        for row in training(pool, PrefetchBudget(1, 1 << 20)):
            time.sleep(0.005)  # ample time to ask ahead, if it did
            assert len(engine.submitted) == train(row) + 1


def test_rows_are_asked_for_before_their_step_begins() -> None:
    engine = SmallEngine()
    asked_before = 0
    with open_pool(engine) as pool:
        for row in training(pool, stop=40):
            position = train(row)
            time.sleep(0.001)
            asked_before += ("training", position + 1) in engine.submitted
    assert asked_before >= 38  # all but the last


def test_look_ahead_crosses_epochs_and_stops_at_the_end() -> None:
    engine = SmallEngine()
    with open_pool(engine) as pool:
        stream = training(pool, stop=2 * NUM_ROWS)
        row_ids = []
        for row in stream:
            if row.row.position == NUM_ROWS - 1:  # the last of the first epoch
                time.sleep(0.05)
                assert ("training", NUM_ROWS + 2) in engine.submitted
            row_ids.append(row.row.row_id)
        assert sorted(row_ids[:NUM_ROWS]) == sorted(row_ids[NUM_ROWS:]) == list(range(NUM_ROWS))
        assert row_ids[:NUM_ROWS] != row_ids[NUM_ROWS:]
        assert stream.state_dict() == {"position": 2 * NUM_ROWS}
    assert len(engine.submitted) == 2 * NUM_ROWS


def test_a_row_is_emptied_when_the_next_is_asked_for() -> None:
    with open_pool(SmallEngine()) as pool:
        stream = training(pool)
        first = next(stream)
        assert first.features.num_tokens == first.row.num_tokens
        next(stream)
        assert first.features.num_tokens == 0
        assert first.row.num_tokens > 0


def test_what_autograd_keeps_of_a_row_outlives_it() -> None:
    """A gradient taken after the next row was asked for is still the right one."""
    with open_pool(SmallEngine()) as pool:
        stream = training(pool)
        row = next(stream)
        weight = torch.ones(16, requires_grad=True)
        loss = (row.features.hidden.flatten(1) * weight).sum()
        expected = row.features.hidden.flatten(1).sum(0)
        next(stream)
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.equal(expected)


def test_the_position_is_the_next_one_to_train_whatever_was_asked_for() -> None:
    engine = SmallEngine()
    with open_pool(engine) as pool:
        stream = training(pool)
        assert stream.state_dict() == {"position": 0}
        for trained in range(1, 4):
            next(stream)
            assert stream.state_dict() == {"position": trained}
        assert len(engine.submitted) > 3
        stream.close()
        assert stream.state_dict() == {"position": 3}


def test_a_stream_goes_on_where_another_stopped() -> None:
    with open_pool(SmallEngine(num_threads=2)) as pool:
        budget = PrefetchBudget(4, 1 << 20)
        first = training(pool, budget)
        trained = [train(next(first)) for _ in range(7)]
        state = first.state_dict()
        first.close()
        second = training(pool, budget)
        second.load_state_dict(state)
        trained += [train(row) for row in second]
        assert second.state_dict() == {"position": 12}
    assert trained == list(range(12))
    assert budget.rows_in_flight == budget.bytes_in_flight == 0


def test_a_stream_can_be_set_back_while_rows_are_in_flight() -> None:
    engine = SmallEngine(num_threads=2, delay_s=lambda request: 0.002)
    with open_pool(engine) as pool:
        stream = training(pool, PrefetchBudget(3, 1 << 20))
        for _ in range(6):
            next(stream)
        stream.load_state_dict({"position": 2})
        assert [train(row) for row in stream] == list(range(2, 12))
    assert engine.most_live_at_all <= 3  # rows given up count until they are thrown away


def test_a_stream_at_its_end_is_at_its_end_after_loading() -> None:
    with open_pool(SmallEngine()) as pool:
        stream = training(pool)
        stream.load_state_dict({"position": 12})
        assert list(stream) == []
        with pytest.raises(CheckpointError, match="position -1"):
            stream.load_state_dict({"position": -1})


def test_every_rank_takes_its_share_of_the_positions() -> None:
    with open_pool(SmallEngine()) as pool:
        seen = []
        for rank in range(3):
            budget = PrefetchBudget(2, 1 << 20)
            stream = FeatureStream(small_row, pool, budget, "training", range(rank, 12, 3))
            seen += [train(row) for row in stream]
            stream.load_state_dict({"position": 6})  # where a step ends for all, whose row it is
            assert [train(row) for row in stream] == [position for position in range(rank, 12, 3) if position >= 6]
    assert sorted(seen) == list(range(12))


def test_damaged_repeated_and_refused_replies_change_nothing_but_counts() -> None:
    faults = {1: ["damaged"], 3: ["twice"], 4: ["unreachable", "damaged", "busy"], 7: ["busy", "twice"], 8: ["damaged"]}
    engine = SmallEngine(num_threads=3, delay_s=slowest_first)
    with open_pool(engine, faults) as pool:
        stream = training(pool)
        assert [train(row) for row in stream] == list(range(12))
        assert stream.stats.rows_retried == 4
        assert pool.stats.late_replies == 2
        assert pool.stats.rows_received == stream.stats.rows_received == 12


def test_a_wrong_reply_ends_the_stream_at_its_row_and_not_before() -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        features.finite = request.position != 2
        return features

    with open_pool(SmallEngine(spoil=spoil)) as pool:
        stream = training(pool)
        assert [train(next(stream)) for _ in range(2)] == [0, 1]
        for _ in range(2):  # and it stays there
            with pytest.raises(CaptureMismatchError, match=r"row 2 .*finite = False, expected True"):
                next(stream)
        assert stream.state_dict() == {"position": 2}


def test_a_row_lost_too_often_ends_the_stream() -> None:
    with open_pool(SmallEngine(), {1: ["damaged"] * 6}) as pool:
        stream = training(pool)
        next(stream)
        with pytest.raises(TransportError, match="row 1 was lost 6 times"):
            next(stream)


@pytest.mark.parametrize("prefetch_rows", [1, 4])
def test_evaluation_runs_in_the_middle_of_training_without_draining_it(prefetch_rows: int) -> None:
    engine = SmallEngine(num_threads=2)
    budget = PrefetchBudget(prefetch_rows, 1 << 20)
    trained = []
    with open_pool(engine) as pool:
        stream = training(pool, budget)
        for row in stream:
            trained.append(train(row))
            if row.row.position in (3, 6):
                held_out = []
                with evaluation(pool, budget) as rows:
                    for held in rows:
                        assert held.features.layers == (1, 2, 3)
                        assert held.features.final_hidden is not None
                        assert held.row.tokens.tolist() == held_out_row(held.row.position).tokens.tolist()
                        held_out.append(train(held))
                assert held_out == [0, 1, 2]
                # what was in flight for training stayed in flight, and nothing was asked for anew
                assert row.features.hidden.equal(expected_hidden(row.row.tokens, (1, 3)))
                asked = [position for spec, position in engine.submitted if spec == "training"]
                assert len(asked) == row.row.position + prefetch_rows
    assert trained == list(range(12))
    assert [position for spec, position in engine.submitted if spec == "training"] == trained
    assert engine.most_live["training"] == prefetch_rows
    assert engine.most_live["evaluation"] == 1  # its own row: training holds all the rest
    assert engine.most_live_at_all == prefetch_rows + 1
    assert budget.rows_in_flight == budget.bytes_in_flight == 0


def test_evaluation_alone_uses_the_budget_and_its_own_row() -> None:
    engine = SmallEngine(num_threads=2, delay_s=lambda request: 0.002)
    with open_pool(engine) as pool:
        list(evaluation(pool, PrefetchBudget(3, 1 << 20), num_rows=10))
    assert engine.most_live["evaluation"] == 4


def test_an_evaluation_that_is_left_early_gives_its_places_back() -> None:
    engine = SmallEngine(num_threads=2)
    budget = PrefetchBudget(2, 1 << 20)
    with open_pool(engine) as pool:
        with evaluation(pool, budget, num_rows=10) as rows:
            train(next(rows))
        assert [train(row) for row in training(pool, budget)] == list(range(12))
    assert engine.most_live_at_all <= 3


def test_a_deep_look_ahead_of_one_session_does_not_starve_another() -> None:
    engine = SmallEngine(num_slots=1)
    engine.hold(1)
    admission = Admission(engine)
    deep_pool, shallow_pool = (open_one(admission) for _ in range(2))
    deep = FeatureStream(small_row, deep_pool, PrefetchBudget(60, 1 << 20), "training", range(60))
    shallow = FeatureStream(held_out_row, shallow_pool, PrefetchBudget(10, 1 << 20), "evaluation", range(10))
    next(deep)  # 60 rows are asked for; the second one keeps the engine until the shallow stream has asked
    threading.Timer(0.1, engine.let_go, (1,)).start()
    for row in shallow:
        train(row)
    order = [spec for spec, _ in engine.submitted]
    last_of_shallow = max(i for i, spec in enumerate(order) if spec == "evaluation")
    assert order[:last_of_shallow].count("training") <= 2 + 10  # one row of the deep one between two of the other
    assert order[:last_of_shallow].count("evaluation") == 9
    deep.close()
    for pool in (deep_pool, shallow_pool):
        pool.close()
    admission.close()
    engine.close()


@pytest.fixture
def stuck() -> Iterator[tuple[FeaturePool, SmallEngine]]:
    """A pool whose engine keeps back the row at position 2."""
    engine = SmallEngine()
    engine.hold(2)
    with open_pool(engine) as pool:
        yield pool, engine
        engine.let_go(2)


def test_closing_from_another_thread_frees_a_trainer_that_waits(stuck: tuple[FeaturePool, SmallEngine]) -> None:
    stream = training(stuck[0])
    for _ in range(2):
        next(stream)
    closer = threading.Timer(0.1, stream.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises(StoppedError, match="'training' rows was closed"):
        next(stream)
    assert time.monotonic() - started < 5
    assert stream.state_dict() == {"position": 2}
    with pytest.raises(StoppedError):
        next(stream)
    closer.join()
    stream.close()


def test_closing_leaves_the_row_in_training_as_it_is() -> None:
    with open_pool(SmallEngine()) as pool:
        stream = training(pool)
        row = next(stream)
        stream.close()
        train(row)


def test_closing_the_pool_frees_a_trainer_that_waits(stuck: tuple[FeaturePool, SmallEngine]) -> None:
    stream = training(stuck[0])
    for _ in range(2):
        next(stream)
    threading.Timer(0.1, stuck[0].close).start()
    with pytest.raises(StoppedError, match="before row 2 came"):
        next(stream)


def test_a_long_wait_says_what_is_missing_and_then_fails(
    stuck: tuple[FeaturePool, SmallEngine], caplog: pytest.LogCaptureFixture
) -> None:
    stream = FeatureStream(
        small_row,
        stuck[0],
        PrefetchBudget(4, 1 << 20),
        "training",
        range(12),
        row_timeout_s=0.5,
        log_every_s=0.2,
    )
    for _ in range(2):
        next(stream)
    with caplog.at_level(logging.WARNING), pytest.raises(TransportError, match=r"row 2 .*row_timeout_s is over"):
        next(stream)
    waits = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert len(waits) == 2
    assert f"row id {small_row(2).row_id}, {small_row(2).num_tokens} tokens" in waits[0]
    assert "of 4 rows asked for are not answered" in waits[0]
    assert 0.4 < stream.stats.wait_s < 2


def test_a_wait_for_room_names_what_holds_it() -> None:
    with open_pool(SmallEngine()) as pool:
        budget = PrefetchBudget(2, 1 << 20)
        holder = training(pool, budget)
        next(holder)
        blocked = training(pool, budget, row_timeout_s=0.1)
        with pytest.raises(TransportError, match=r"held by other streams \(2 rows"):
            next(blocked)
        holder.close()
        assert train(next(blocked)) == 0


def test_stats_tell_waiting_and_what_is_in_flight() -> None:
    engine = SmallEngine(delay_s=lambda request: 0.02)
    with open_pool(engine) as pool:
        stream = training(pool, PrefetchBudget(3, 1 << 20))
        assert (stream.stats.rows_in_flight, stream.stats.bytes_in_flight) == (0, 0)
        row = next(stream)
        stats = stream.stats
        assert stats.wait_s > 0.015
        assert stats.rows_in_flight == 3
        assert stats.bytes_in_flight == sum(row_bytes(position) for position in range(3))
        assert stats.bytes_received == row.features.num_bytes == tensor_bytes(0)
        for _ in stream:
            pass
        assert stream.stats.rows_in_flight == 0
        assert stream.stats.bytes_received == sum(tensor_bytes(position) for position in range(12))


def test_features_nobody_registered_are_refused_before_the_first_row() -> None:
    with open_pool(SmallEngine()) as pool, pytest.raises(ConfigError, match="'other'"):
        FeatureStream(small_row, pool, PrefetchBudget(1, 1), "other", range(3))


def test_a_row_source_that_fails_leaves_no_place_taken() -> None:
    def rows(position: int) -> Row:
        if position == 1:
            raise OSError("the cache file is gone")
        row: Row = small_row(position)
        return row

    with open_pool(SmallEngine()) as pool:
        budget = PrefetchBudget(4, 1 << 20)
        stream = FeatureStream(rows, pool, budget, "training", range(3))
        with pytest.raises(OSError, match="the cache file is gone"):
            next(stream)
        stream.close()
        deadline = time.monotonic() + 5
        while budget.rows_in_flight and time.monotonic() < deadline:
            time.sleep(0.001)
        assert budget.rows_in_flight == 0


@pytest.mark.parametrize("seed", range(3))
def test_bounds_and_order_hold_under_random_delays_faults_and_evaluations(seed: int) -> None:
    draw = np.random.default_rng(seed)
    kinds = ["damaged", "twice", "busy", "unreachable"]
    faults = {int(p): list(draw.choice(kinds, int(draw.integers(1, 4)))) for p in draw.choice(60, 20, replace=False)}
    delays = draw.uniform(0, 0.003, 1000)
    engine = SmallEngine(num_threads=4, num_slots=int(draw.integers(1, 6)), delay_s=lambda r: delays[r.position])
    budget = PrefetchBudget(int(draw.integers(1, 6)), 1 << 20)
    trained = []
    with open_pool(engine, faults) as pool:
        stream = training(pool, budget, stop=60)
        for row in stream:
            assert budget.rows_in_flight <= budget.max_rows
            trained.append(train(row))
            if draw.random() < 0.1:
                with evaluation(pool, budget, num_rows=4) as rows:
                    for held in rows:
                        train(held)
    assert trained == list(range(60))
    assert engine.most_live_at_all <= budget.max_rows + 1
    assert sum(engine.live.values()) == 0


@pytest.mark.parametrize(("prefetch_rows", "ahead"), [(1, 0), (4, 11)])
def test_stats_tell_how_often_the_next_row_had_been_asked_for(prefetch_rows: int, ahead: int) -> None:
    def spoil(request: RowRequest, features: Features) -> Features:
        features.transfer_s = 0.25  # as the receiver of a remote row notes it
        return features

    with open_pool(SmallEngine(spoil=spoil)) as pool:
        stream = training(pool, PrefetchBudget(prefetch_rows, 1 << 20))
        assert len(list(map(train, stream))) == 12
        stats = stream.stats
        assert (stats.rows_asked_ahead, stats.rows_not_asked_ahead) == (ahead, 11 - ahead)
        assert stats.transfer_s == pool.stats.transfer_s == 12 * 0.25
