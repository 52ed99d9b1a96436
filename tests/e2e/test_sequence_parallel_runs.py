"""Whole runs whose ranks train each row together: the losses of one rank, and one forward of the target a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forking import Commands
from paceline.config.run import RunConfig
from ranks import run_ranks
from served import Served, num_forwards, num_parts_sent
from whole_run import assert_close_runs, lines, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__rows_per_step": 3, "training__eval_every": 6, "training__max_eval_rows": 4}

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path, tiny_target: Path, data: Path, target_servers: list[Served]) -> MakeConfig:
    def make(name: str, num_servers: int = 1, **changes: Any) -> RunConfig:
        urls = [server.url for server in target_servers[:num_servers]]
        servers = {"placement__target": "urls", "placement__urls": urls, "placement__launcher": "external"}
        return run_config(tmp_path / name, tiny_target, data, **{**SETTINGS, **servers, **changes})

    return make


@pytest.mark.parametrize("transport", ["file", pytest.param("http", marks=pytest.mark.long)])
def test_two_ranks_that_share_rows_train_as_one_does_and_cost_the_target_nothing(
    commands: Commands, make_config: MakeConfig, target_servers: list[Served], transport: str
) -> None:
    kind = {"transport__kind": transport}
    alone, together = make_config("alone", **kind), make_config("together", training__sequence_parallel=2, **kind)
    assert run(alone).status == "finished"
    before, parts_before = num_forwards(target_servers[0]), num_parts_sent(target_servers[0])
    run_ranks(commands, together, 2)
    assert_close_runs(together, alone)
    num_evaluations = len(lines(together, "eval"))
    assert num_evaluations > 1
    num_rows = sum(line["rows"] for line in lines(together))
    num_computed = num_rows + 2 * num_evaluations  # the held-out data are two rows
    assert num_forwards(target_servers[0]) - before == num_computed
    assert num_parts_sent(target_servers[0]) - parts_before == 2 * num_computed, "held-out rows come in parts, too"
    of_one, of_two = (lines(config)[-1]["stream"]["bytes_received"] for config in (alone, together))
    assert of_one < of_two < 1.4 * of_one  # the sum over both ranks: each has its half, and the halo


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_groups_of_two_ranks_on_three_servers_go_on_where_they_were_stopped(
    commands: Commands, make_config: MakeConfig, sharding: str
) -> None:
    changes = {"num_servers": 3, "training__sequence_parallel": 2, "training__sharding": sharding}
    whole, halves = make_config("whole", **changes), make_config("halves", **changes)
    alone = make_config("alone")
    assert run(alone).status == "finished"
    run_ranks(commands, whole, 4)
    assert_close_runs(whole, alone)
    run_ranks(commands, halves, 4, stop_after_looks=4)
    assert 0 < len(losses(halves)) < len(losses(whole))
    run_ranks(commands, halves, 4)
    assert losses(halves) == losses(whole)
    assert same_weights(halves, whole)


@pytest.mark.long
def test_a_run_on_whole_rows_goes_on_with_rows_in_parts(commands: Commands, make_config: MakeConfig) -> None:
    alone = make_config("alone")
    assert run(alone).status == "finished"
    run_ranks(commands, make_config("run"), 2, stop_after_looks=4)
    assert 0 < len(losses(make_config("run"))) < len(losses(alone))
    together = make_config("run", training__sequence_parallel=2)
    run_ranks(commands, together, 2)
    assert_close_runs(together, alone)
