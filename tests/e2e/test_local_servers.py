"""`placement.target = "servers"`: one command starts servers and trainer, keeps them going, and leaves nothing."""

import json
import os
import signal
from pathlib import Path

import pytest
import tomli_w

from forking import Commands
from own_processes import alive, children_of, num_steps, start
from paceline.config.run import RunConfig
from whole_run import lines, losses, run, run_config, run_table, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__num_epochs": 3, "training__eval_every": 7}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    config = run_config(tmp_path_factory.mktemp("inline") / "run", tiny_target, data, **SETTINGS)
    assert run(config).status == "finished"
    return config


def servers_config(run_dir: Path, target: Path, data: Path, num_servers: int = 1, **changes: object) -> RunConfig:
    return run_config(
        run_dir,
        target,
        data,
        **{**SETTINGS, "placement__target": "servers", "placement__num_servers": num_servers} | changes,
    )


def test_one_command_trains_on_servers_of_its_own_as_if_the_target_were_here(
    commands: Commands, inline: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = servers_config(tmp_path / "run", tiny_target, data)
    command = start(commands, config, tmp_path)
    assert command.wait_until(lambda: num_steps(config) > 1), command.output
    pids = children_of(command.pid)
    assert pids.keys() == {"server-0", "trainer-0"}
    words = Path(f"/proc/{pids['server-0']}/cmdline").read_bytes().decode().split("\0")
    token = Path(words[words.index("--token-file") + 1]).read_text()
    assert command.wait() == 0, command.output
    assert losses(config) == losses(inline)
    assert same_weights(config, inline)
    check_balance(config, command.output)
    assert not any(alive(pid) for pid in pids.values())
    assert json.loads((tmp_path / "run" / "servers.json").read_text()) == {"servers": []}
    assert len(token) >= 32
    assert not any(token in text for text in (command.output, *words)), "a secret stays in its file"
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or token.encode() not in file.read_bytes(), file


def check_balance(config: RunConfig, output: str) -> None:
    """Every interval (a step, here) has a verdict, but for those in which no row came; the end has one for the run."""
    balances = [line["balance"] for line in lines(config) if "balance" in line]
    assert balances
    assert {(one["num_servers"], one["num_trainers"]) for one in balances} == {(1, 1)}
    assert {one["limit"] for one in balances} <= {"target", "trainers", "balanced", "path"}
    windows = [one["window"] for one in balances]
    assert 0 < sum(window["target_s"] for window in windows) <= sum(window["server_s"] for window in windows) + 1.0
    assert all(0 <= one["trainers_wait"] <= 1 for one in balances)
    assert "balance over the whole run: " in output


@pytest.mark.long
def test_a_server_killed_again_and_again_is_started_anew_and_nothing_is_lost(
    commands: Commands, inline: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = servers_config(tmp_path / "run", tiny_target, data, num_servers=2)
    command = start(commands, config, tmp_path)
    for number, step in enumerate((2, 8)):
        assert command.wait_until(lambda step=step: num_steps(config) >= step), command.output  # type: ignore[misc]
        assert command.wait_until(lambda: all(f"server-{rank} is ready" in command.output for rank in (0, 1)))
        victim = children_of(command.pid).get(f"server-{number}")
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
    assert command.wait() == 0, command.output
    assert losses(config) == losses(inline)
    assert same_weights(config, inline)
    assert "is started anew (1 of 5)" in command.output


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_processes(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    config = servers_config(tmp_path / "run", tiny_target, data, training__num_epochs=500)
    command = start(commands, config, tmp_path)
    assert command.wait_until(lambda: num_steps(config) > 2), command.output
    pids = [command.pid, *children_of(command.pid).values()]
    assert len(pids) == 3
    command.send_signal(signum)
    code = command.wait(10)
    assert code == (-signal.SIGKILL if signum == signal.SIGKILL else 128 + signal.SIGTERM), command.output
    for pid in pids:
        assert commands.ask("wait_gone", pid, 10.0), f"process {pid} is left"
    if signum == signal.SIGTERM:
        assert "checkpoint" in command.output


@pytest.mark.long
def test_a_server_that_cannot_start_ends_the_run_with_its_last_lines(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    table = run_table(
        tmp_path / "run", tiny_target, data, placement__target="servers", target__attention="flash_attention_2"
    )
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(table))
    command = commands.start("train", str(file))
    assert command.wait() == 1
    assert "server-0 ended while it was starting" in command.output
    assert "flash" in command.output.lower()
