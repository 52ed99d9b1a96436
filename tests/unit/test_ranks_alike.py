"""What trainer ranks have to agree on: one run, one configuration, and when to break an evaluation off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.config.run_dir import RunDir
from paceline.config.training import TrainingConfig
from paceline.errors import ConfigError, RunDirectoryError, StoppedError
from paceline.evaluation.held_out import HeldOutEvaluation
from paceline.launch.plan import config_on
from paceline.launch.run import Run, check_ranks_alike, facts_of_rank
from paceline.launch.train import warn_of_idle_ranks
from whole_run import run_config

NUM_RANKS = 2


def test_ranks_may_differ_in_what_is_of_a_host_and_in_nothing_else(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tmp_path / "target", tmp_path)
    run = Run(RunDir(tmp_path / "run"), "1234")
    ours = facts_of_rank(run, config)
    mounted_elsewhere = config_on(config, "cuda:1").model_copy(update={"run_dir": "/mnt/run"})
    check_ranks_alike([ours, facts_of_rank(run, mounted_elsewhere)])

    other_config = run_config(tmp_path / "run", tmp_path / "target", tmp_path, training__rows_per_step=7)
    with pytest.raises(ConfigError, match=r"training\.rows_per_step: 1 on rank 0, 7 on rank 2\nstart all"):
        check_ranks_alike([ours, ours, facts_of_rank(run, other_config)])
    with pytest.raises(RunDirectoryError, match="rank 0 has opened run 1234, rank 1 sees run 5678"):
        check_ranks_alike([ours, facts_of_rank(replace(run, run_id="5678"), config)])


def test_ranks_that_no_row_is_left_for_are_warned_of_with_both_numbers(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_ranks(TrainingConfig(rows_per_step=4), 4)
    warn_of_idle_ranks(TrainingConfig(rows_per_step=2, sequence_parallel=2), 4)
    assert not caplog.records
    warn_of_idle_ranks(TrainingConfig(rows_per_step=3), 8)
    warn_of_idle_ranks(TrainingConfig(rows_per_step=1, sequence_parallel=2), 6)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    alone, in_groups = caplog.messages
    assert alone.startswith("training.rows_per_step = 3 for 8 trainer ranks: 5 of them train nothing;")
    assert alone.endswith("set it to a multiple of 8, or start at most 3 ranks")
    assert in_groups.startswith(
        "training.rows_per_step = 1 for 6 trainer ranks in groups of 2: 4 of them train nothing;"
    )
    assert in_groups.endswith("set it to a multiple of 3, or start at most 2 ranks")


def evaluate_on_ranks(asked: Callable[[int, int], bool], close: Callable[[int, int], bool]) -> list[Any]:
    """Each rank's figures, or its error, and the rows it had; asked and close say of (rank, row) what happens there."""
    meeting, values = threading.Barrier(NUM_RANKS, timeout=10), {}
    num_rows = 9  # of rank 0 five, of rank 1 four

    def evaluate(rank: int) -> tuple[Any, int]:
        rows: list[int] = []

        def gather(own: Any) -> list[Any]:
            values[rank] = own
            meeting.wait()
            everyone = [values[other] for other in range(NUM_RANKS)]
            meeting.wait()
            return everyone

        def agree_to_stop() -> bool:
            return any(gather(bool(rows) and asked(rank, rows[-1])))

        @contextmanager
        def open_stream(num: int) -> Iterator[Iterator[int]]:
            def share() -> Iterator[int]:
                for row in range(rank, num, NUM_RANKS):
                    if close(rank, row):
                        raise StoppedError("the stream was closed")
                    rows.append(row)
                    yield row

            yield share()

        evaluation = HeldOutEvaluation({}, open_stream, num_rows, NUM_RANKS, gather, agree_to_stop)
        try:
            return evaluation(0), len(rows)
        except StoppedError as error:
            return error, len(rows)

    with ThreadPoolExecutor(NUM_RANKS) as threads:
        return list(threads.map(evaluate, range(NUM_RANKS)))


def never(rank: int, row: int) -> bool:
    return False


def test_an_evaluation_that_one_rank_breaks_off_ends_on_all() -> None:
    assert evaluate_on_ranks(asked=never, close=never) == [({}, 5), ({}, 4)]

    def at_row_3(rank: int, row: int) -> bool:
        return row == 3

    asked, closed = evaluate_on_ranks(at_row_3, never), evaluate_on_ranks(never, at_row_3)
    for cut in (asked, closed):
        assert [type(end) for end, _ in cut] == [StoppedError, StoppedError]
    assert [num_rows for _, num_rows in asked] == [2, 2], "at the same turn"
    assert [num_rows for _, num_rows in closed] == [5, 1], "the other hears of it at its end, or when it is asked to"
