"""One run on several trainer ranks: the losses of one rank, exact resume, also on another number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forking import Commands
from paceline.config.run import RunConfig
from ranks import run_ranks
from served import Served, num_forwards
from whole_run import assert_close_runs, assert_same_rows, lines, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__rows_per_step": 5, "training__eval_every": 4, "training__max_eval_rows": 4}

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path, tiny_target: Path, data: Path) -> MakeConfig:
    def make(name: str, **changes: Any) -> RunConfig:
        return run_config(tmp_path / name, tiny_target, data, **{**SETTINGS, **changes})

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """Both drafts on one rank."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("alone") / "run", tiny_target, data, **SETTINGS)
    assert run(config).status == "finished"
    assert len(losses(config)) >= 4
    return config


@pytest.mark.parametrize(
    ("num_ranks", "sharding"),
    [
        (2, "full"),
        (3, "none"),
        pytest.param(2, "none", marks=pytest.mark.long),
        pytest.param(4, "none", marks=pytest.mark.long),
        pytest.param(4, "full", marks=pytest.mark.long),
    ],
)
def test_losses_do_not_depend_on_the_number_of_ranks(
    commands: Commands, alone: RunConfig, make_config: MakeConfig, num_ranks: int, sharding: str
) -> None:
    config = make_config("run", training__sharding=sharding)
    run_ranks(commands, config, num_ranks)
    assert_close_runs(config, alone)
    balances = {line["step"]: line["balance"] for line in lines(config) if "balance" in line}
    assert balances
    assert {one["num_trainers"] for one in balances.values()} == {num_ranks}
    for line in lines(config):
        if line["step"] in balances:  # every token once, whichever rank trained it
            assert balances[line["step"]]["window"]["tokens"] == line["tokens"]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_server_computes_each_row_once_whatever_the_number_of_ranks(
    commands: Commands, alone: RunConfig, make_config: MakeConfig, target_servers: list[Served], num_ranks: int
) -> None:
    """One server: none is asked for a row a second time because it is slow."""
    server = target_servers[0]
    before = num_forwards(server)
    config = make_config("run", placement__target="urls", placement__urls=[server.url], training__eval_every=0)
    run_ranks(commands, config, num_ranks)
    assert_same_rows(config, alone)
    (evaluated,) = lines(config, "eval")
    num_evaluated = 2
    assert evaluated["step"] == len(lines(config))
    assert num_forwards(server) - before == sum(line["rows"] for line in lines(config)) + num_evaluated


@pytest.mark.parametrize(
    ("num_ranks", "sharding", "eval_every", "looks"),
    [
        pytest.param(3, "none", 4, 3, id="between two steps", marks=pytest.mark.long),
        pytest.param(3, "none", 4, 4, id="before the last row of step 2"),
        pytest.param(3, "full", 4, 4, id="the same, sharded", marks=pytest.mark.long),
        pytest.param(2, "full", 1, 5, id="in the evaluation after step 1"),
    ],
)
def test_ranks_stopped_in_the_middle_go_on_bit_by_bit(
    commands: Commands, make_config: MakeConfig, num_ranks: int, sharding: str, eval_every: int, looks: int
) -> None:
    """One rank is asked; it looks between steps, before each row of its own or of others, and in evaluations."""
    changes = {"training__sharding": sharding, "training__eval_every": eval_every}
    whole, halves = (make_config(name, **changes) for name in ("whole", "halves"))
    run_ranks(commands, whole, num_ranks)
    run_ranks(commands, halves, num_ranks, stop_after_looks=looks)
    assert len(losses(halves)) == 1
    assert not lines(halves, "eval")
    run_ranks(commands, halves, num_ranks)
    assert losses(halves) == losses(whole)
    assert same_weights(halves, whole)
    evaluated = [[(line["step"], line["drafts"]) for line in lines(config, "eval")] for config in (halves, whole)]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "full"), (1, "none")), pytest.param((1, "none"), (3, "full"), marks=pytest.mark.long)],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    commands: Commands, alone: RunConfig, make_config: MakeConfig, before: tuple[int, str], after: tuple[int, str]
) -> None:
    config = make_config("run", training__sharding=before[1])
    run_ranks(commands, config, before[0], stop_after_looks=3 if before[0] > 1 else 12)
    assert 0 < len(losses(config)) < len(losses(alone))
    run_ranks(commands, make_config("run", training__sharding=after[1]), after[0])
    assert_close_runs(config, alone)
