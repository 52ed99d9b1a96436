"""The verdict on servers and trainers: its arithmetic by hand, on figures that were measured, and how it is said."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from paceline.observe.balance import Balance, BalanceWindow, across_ranks, judge
from paceline.observe.balance_lines import BalanceLines
from paceline.observe.metrics import Line


def window(**figures: float) -> BalanceWindow:
    """100 seconds, 100,000 tokens, one server that worked on each of them."""
    return replace(
        BalanceWindow(wall_s=100.0, tokens=1e5, num_bytes=1e9, target_tokens=1e5, server_s=100.0, target_s=1.0),
        **figures,
    )


def verdict(given: BalanceWindow, num_trainers: int = 1) -> Balance:
    found = judge(given, num_trainers)
    assert found is not None
    return found


def test_trainers_that_wait_for_a_busy_server_want_another_one() -> None:
    found = verdict(window(data_wait_s=41.0, busy_s=58.0, target_s=99.0))
    # demand: 1e5 tokens in the 59 s without waiting; supply: 1e5 in 99 s; two servers supply 2020 a second
    assert found.demand_tokens_per_s == pytest.approx(1e5 / 59)
    assert found.supply_tokens_per_s == pytest.approx(1e5 / 99)
    assert found.limit == "target"
    assert found.one_more_server == pytest.approx(100 / 59)
    assert found.one_more_trainer == pytest.approx(100 / 99)
    assert found.one_server_fewer is None
    assert found.text == ("the trainer waits 41 % of the time, the server works 99 %: 1 more server would give 1.7x")


def test_the_next_server_is_worth_no_more_than_demand_allows() -> None:
    found = verdict(window(data_wait_s=70.0, busy_s=30.0, target_s=195.0, server_s=200.0))
    assert found.num_servers == 2
    assert found.one_more_server == pytest.approx(3 / 2 * 200 / 195)
    assert found.one_server_fewer == pytest.approx(1 / 2 * 200 / 195)
    assert "the 2 servers work 98 %" in found.text


def test_idle_servers_want_another_trainer_or_may_go() -> None:
    found = verdict(window(data_wait_s=1.0, busy_s=98.0, target_s=80.0, server_s=200.0), num_trainers=2)
    # supply 2500 a second, demand 1010; one server would still supply 1250
    assert found.limit == "trainers"
    assert found.one_more_trainer == pytest.approx(3 / 2 * 100 / 99)
    assert found.one_more_server == pytest.approx(100 / 99)
    assert found.one_server_fewer == 1.0
    assert found.text == (
        "the 2 servers work 40 % of the time, the 2 trainers wait 1 %: 1 more trainer would give 1.5x, "
        "1 server fewer would cost nothing"
    )


def test_a_server_that_is_needed_is_not_called_superfluous() -> None:
    found = verdict(window(data_wait_s=1.0, busy_s=98.0, target_s=140.0, server_s=200.0))
    assert found.limit == "trainers"
    assert found.one_server_fewer == pytest.approx(1 / 1.4)
    assert "fewer" not in found.text


@pytest.mark.parametrize(("wait_s", "target_s"), [(3.0, 98.0), (2.0, 94.0)])
def test_two_sides_within_a_few_per_cent_are_balanced(wait_s: float, target_s: float) -> None:
    found = verdict(window(data_wait_s=wait_s, busy_s=100 - wait_s, target_s=target_s))
    assert found.limit == "balanced"
    assert found.text.startswith("balanced: the trainer waits ")


def test_trainers_that_wait_for_idle_servers_are_held_up_by_the_way_between() -> None:
    found = verdict(window(data_wait_s=40.0, busy_s=60.0, target_s=50.0))
    assert found.limit == "path"
    assert (found.one_more_server, found.one_more_trainer) == (None, None)
    assert "transport.prefetch_rows" in found.text


def test_on_one_device_the_target_has_a_share_and_servers_are_no_free_gain() -> None:
    found = verdict(window(data_wait_s=5.0, busy_s=44.0, target_s=56.0, server_s=0.0))
    assert (found.limit, found.num_servers, found.supply_tokens_per_s) == ("shared", 0, None)
    assert found.servers_work == pytest.approx(0.56)
    assert "at work 56 % and 44 % of the time: servers" in found.text
    assert "further devices" in found.text


def test_times_that_overlap_on_one_device_are_not_taken_for_shares_of_its_work() -> None:
    found = verdict(window(data_wait_s=2.0, busy_s=96.0, target_s=90.0, server_s=0.0))
    assert found.servers_work == pytest.approx(0.9)
    assert "at work 90 % and 96 % of the time, in part at once" in found.text


def test_on_several_devices_the_share_is_that_of_each() -> None:
    one = window(data_wait_s=5.0, busy_s=44.0, target_s=56.0, server_s=0.0)
    both = verdict(across_ranks([one, one]), num_trainers=2)
    assert both.servers_work == pytest.approx(0.56)
    assert both.tokens_per_s == 2 * verdict(one).tokens_per_s
    assert "share each trainer's device" in both.text


def test_rows_from_disk_have_a_speed() -> None:
    found = verdict(window(data_wait_s=20.0, busy_s=79.0, target_s=0.0, server_s=0.0, num_bytes=123e9))
    assert found.limit == "disk"
    assert found.text == "the trainer waits 20 % of the time for rows from disk, read at 1.23 GB/s"
    assert verdict(window(data_wait_s=1.0, target_s=0.0, server_s=0.0)).limit == "trainers"


def test_nothing_is_said_of_a_window_in_which_nothing_happened() -> None:
    assert judge(BalanceWindow(), 1) is None
    assert judge(window(tokens=0.0), 1) is None
    assert judge(window(target_s=0.0, target_tokens=0.0), 1) is None  # servers, and no row of theirs
    assert judge(window(target_s=0.0, target_tokens=0.0, server_s=0.0), 1) is None  # all rows had come before


def test_a_gpu_that_works_while_its_host_waits_does_not_wait() -> None:
    assert window(wall_s=10.0, data_wait_s=7.0, busy_s=9.0).wait_s == 1.0
    # nor does one that is idle because its host is slow
    assert window(wall_s=10.0, data_wait_s=0.5, busy_s=2.0).wait_s == 0.5
    # marks of the device may add up to more than the host's clock says
    assert window(wall_s=10.0, data_wait_s=3.0, busy_s=11.0).wait_s == 0.0


def test_ranks_add_up_and_the_one_that_waited_longest_tells_how_long() -> None:
    """One server, 200 ms a row; two ranks of 100 ms a row. The second rank's row comes last: the first one's backward
    pass waits for it, and looks like work."""
    early = BalanceWindow(
        wall_s=40.0, tokens=1e5, data_wait_s=10.0, busy_s=30.0, target_tokens=1e5, target_s=20.0, server_s=40.0
    )
    late = replace(early, data_wait_s=30.0, busy_s=10.0)
    together = across_ranks([early, late])
    assert together.tokens == 2e5
    assert together.target_s == 40.0
    assert (together.wall_s, together.server_s, together.wait_s) == (40.0, 40.0, 30.0)
    found = verdict(together, num_trainers=2)
    assert found.text == "the 2 trainers wait 75 % of the time, the server works 100 %: 1 more server would give 2.0x"


def test_windows_that_follow_each_other_add_up() -> None:
    given = window(data_wait_s=7.0)
    twice = given + given
    assert (twice.wall_s, twice.wait_s, twice.server_s) == (200.0, 14.0, 200.0)
    assert verdict(twice).to_line() | {"window": None} == verdict(given).to_line() | {"window": None}


@pytest.mark.parametrize(
    ("demand", "supply", "num_servers", "trained"),
    [(48_925, 37_857, 1, 38_087), (48_925, 2 * 37_857, 2, 49_519), (20_349, 37_700, 1, 20_209)],
)
def test_the_model_holds_for_runs_that_were_measured(
    demand: float, supply: float, num_servers: int, trained: float
) -> None:
    """Steps come as fast as the slower side: `benchmarks/disaggregation.py` on 2 and 3 H100, see the log."""
    assert trained == pytest.approx(min(demand, supply), rel=0.02)
    wall_s, tokens = 100.0, trained * 100
    found = verdict(
        BalanceWindow(
            wall_s=wall_s,
            tokens=tokens,
            data_wait_s=max(0.0, wall_s - tokens / demand),
            busy_s=tokens / demand,
            target_tokens=tokens,
            target_s=min(1.0, trained / supply) * wall_s * num_servers,
            server_s=wall_s * num_servers,
        )
    )
    if num_servers == 1 and supply < demand:
        assert found.limit == "target"
        assert found.one_more_server == pytest.approx(49_519 / 38_087, rel=0.02)  # what the second server gave
    else:
        assert found.limit == "trainers"
        assert found.one_more_server == pytest.approx(1.0, abs=0.02)


def train_line(step: int, given: BalanceWindow) -> Line:
    found = verdict(given)
    return {"kind": "train", "step": step, "balance": json.loads(json.dumps(found.to_line()))}


def feed(view: BalanceLines, *windows: BalanceWindow) -> None:
    for step, given in enumerate(windows):
        view.write({"kind": "train", "step": 2 * step})  # a step that is not the last of its interval
        view.write(train_line(2 * step + 1, given))
        view.flush()


WAITING = window(data_wait_s=50.0, busy_s=50.0, target_s=99.0)
WORKING = window(data_wait_s=1.0, busy_s=99.0, target_s=50.0)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_verdict_is_said_when_it_has_settled_and_not_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    view = BalanceLines()
    feed(view, WORKING, WAITING)  # the first is warm-up, the second may be chance
    assert said(caplog) == []
    feed(view, WAITING, WAITING, WAITING)
    assert len(said(caplog)) == 1
    assert said(caplog)[0].startswith("balance: the trainer waits 50 % of the time, the server works 99 %")
    feed(view, WORKING, WAITING, WORKING, WORKING)
    assert len(said(caplog)) == 2
    assert said(caplog)[1].startswith("balance: the server works 50 %")
    feed(view, *[WORKING] * 60)
    assert len(said(caplog)) == 3, "an unchanged verdict is said again now and then"


def test_at_the_end_it_is_said_for_the_whole_run_without_its_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    view = BalanceLines()
    feed(view, window(wall_s=1000.0, busy_s=1000.0, server_s=1000.0), WAITING)
    view.close()
    (line,) = said(caplog)
    assert line == (
        "balance over the whole run: the trainer waits 50 % of the time, the server works 99 %: 1 more server would "
        "give 2.0x (1000 tokens/s)"
    )


def test_a_run_of_one_interval_has_an_end_too_and_one_of_none_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    BalanceLines().close()
    assert said(caplog) == []
    view = BalanceLines()
    feed(view, WAITING)
    view.close()
    assert len(said(caplog)) == 1


def test_lines_without_a_verdict_are_let_pass() -> None:
    view = BalanceLines()
    lines: list[dict[str, Any]] = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 1, "drafts": {}}]
    for line in lines:
        view.write(line)
        view.flush()
    view.close()
