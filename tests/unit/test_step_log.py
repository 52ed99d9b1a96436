"""The verdict of an interval whose end a run does not see through."""

from __future__ import annotations

import threading
from typing import Any

import torch

from paceline.training.ranks import Ranks
from paceline.training.step_record import LossSums, StepLog, StepRecord

FIGURES = {"bytes_received": 1e6, "target_tokens": 1000.0, "target_s": 1.0}


def record(step: int, sessions: float) -> StepRecord:
    stream = {name: value * step for name, value in FIGURES.items()} | {"sessions": sessions}
    one = torch.ones(())
    return StepRecord(
        step,
        num_rows=1,
        num_tokens=1000,
        seconds={"data_wait": 0.1, "step": 0.5},
        sums={"draft": LossSums(one.device)},
        grad_norms={"draft": one},
        learning_rates={"draft": 1e-3},
        stream=stream,
    )


def test_a_run_that_is_stopped_in_its_first_interval_is_one_with_servers() -> None:
    log = StepLog({}, Ranks(threading.Event()))
    log.append(record(1, 1.0))
    log.append(record(2, 0.0))
    *_, line = log.read()
    assert line["balance"]["num_servers"] >= 1


def test_servers_that_left_in_an_interval_are_not_counted() -> None:
    log = StepLog({}, Ranks(threading.Event()))
    found = []
    for step, sessions in ((1, 8.0), (2, 1.0)):
        log.append(record(step, sessions))
        (line,) = log.read()
        found.append(line["balance"]["num_servers"])
    assert found[1] == 1


def test_the_last_interval_of_a_stopped_run_is_one_with_servers() -> None:
    """Its stream is closed by then, and its sessions with it; a target inline has none from the beginning."""
    log = StepLog({}, Ranks(threading.Event()))
    limits: list[Any] = []
    for step, sessions in ((1, 1.0), (2, 0.0)):
        log.append(record(step, sessions))
        limits += [line["balance"]["num_servers"] for line in log.read()]
    assert limits[0] >= 1
    assert limits[1] >= 1
    log.append(record(3, 0.0))
    (line,) = log.read()
    assert (line["balance"]["num_servers"], line["balance"]["limit"]) == (0, "shared")
