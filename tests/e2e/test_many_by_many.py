"""N trainers on M servers by one command: the losses of one trainer and one server, whatever dies on the way."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forking import Commands
from own_processes import children_of, num_steps, start
from paceline.config.run import RunConfig
from whole_run import assert_close_runs, losses, run_config

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.long]
SETTINGS = {
    "training__rows_per_step": 4,
    "training__num_epochs": 4,
    "training__eval_every": 6,
    "placement__target": "servers",
}

Train = Callable[..., RunConfig]


@pytest.fixture
def train(commands: Commands, tiny_target: Path, data: Path, tmp_path: Path) -> Train:
    """Runs `paceline train` to its end; `disturb` may do something to its processes once five steps are done."""

    def train_one(name: str, disturb: Callable[[dict[str, int]], None] | None = None, **changes: Any) -> RunConfig:
        config = run_config(tmp_path / name / "run", tiny_target, data, **{**SETTINGS, **changes})
        (tmp_path / name).mkdir()
        command = start(commands, config, tmp_path / name)
        if disturb is not None:
            assert command.wait_until(lambda: num_steps(config) >= 5, 200), command.output
            disturb(children_of(command.pid))
        assert command.wait(240) == 0, command.output
        assert len(losses(config)) > 10
        return config

    return train_one


def test_targets_over_two_processes_serve_two_trainers(train: Train) -> None:
    parallel = {"target__tensor_parallel": 2}
    alone = train("alone", **parallel)
    together = train("together", **parallel, placement__num_servers=2, placement__num_trainers=2)
    assert_close_runs(together, alone)


def test_two_trainers_lose_one_of_three_servers_and_no_row(train: Train) -> None:
    def kill(pids: dict[str, int]) -> None:
        assert pids.keys() == {"server-0", "server-1", "server-2", "trainer-0", "trainer-1"}
        os.kill(pids["server-1"], signal.SIGKILL)

    many = {"placement__num_servers": 3, "placement__num_trainers": 2}
    undisturbed, disturbed = train("undisturbed", **many), train("disturbed", kill, **many)
    assert losses(disturbed) == losses(undisturbed)
    assert_close_runs(undisturbed, train("alone"))


def test_two_groups_of_two_trainers_lose_one_of_three_servers_and_no_part(train: Train) -> None:
    def kill(pids: dict[str, int]) -> None:
        os.kill(pids["server-2"], signal.SIGKILL)

    many = {"placement__num_servers": 3, "placement__num_trainers": 4, "training__sequence_parallel": 2}
    undisturbed, disturbed = train("undisturbed", **many), train("disturbed", kill, **many)
    assert losses(disturbed) == losses(undisturbed)
    assert_close_runs(undisturbed, train("alone"))
