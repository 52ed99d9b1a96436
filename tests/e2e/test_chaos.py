"""Whatever dies, hangs or comes back, and however often: the losses of an undisturbed run, and nothing left behind."""

import json
import random
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from forking import Command, Commands
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from proxied import fault_proxy
from served import Served, ready, start_server, start_servers
from whole_run import lines, losses, run, run_config, same_weights

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.long]
SETTINGS = {"training__num_epochs": 10, "training__rows_per_step": 2, "training__eval_every": 40}
QUICK = {"pool__health_every_s": 0.5, "pool__health_timeout_s": 2.0, "transport__kind": "http"}
ENDS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """160 steps."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("inline") / "run", tiny_target, data, **SETTINGS)
    assert run(config).status == "finished"
    return config


class Returning:
    """A server that comes back at the address it had."""

    def __init__(self, commands: Commands, target: Path, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._commands, self._target, self._directory = commands, target, directory
        self._num_starts = 0
        self.start()

    def start(self) -> None:
        self._num_starts += 1
        self._place = self._directory / f"{self.port}-{self._num_starts}"
        self.command = start_server(self._commands, self._target, self._place, "--port", str(self.port))

    def wait_until_ready(self) -> None:
        ready(self.command, self._place)

    def kill(self) -> None:
        self.command.send_signal(signal.SIGKILL)
        self.command.wait()


@pytest.fixture
def returning(commands: Commands, tiny_target: Path, tmp_path: Path) -> Iterator[list[Returning]]:
    """Two servers that may be killed."""
    servers = [Returning(commands, tiny_target, tmp_path) for _ in range(2)]
    for server in servers:
        server.wait_until_ready()
    yield servers
    for server in servers:
        server.kill()


def remote_config(inline: RunConfig, run_dir: Path, urls: list[str], **changes: Any) -> RunConfig:
    settings = SETTINGS | QUICK | {"placement__target": "urls", "placement__urls": urls}
    return run_config(run_dir, Path(inline.target.model), Path(inline.data.train).parent, **settings | changes)


def start(commands: Commands, config: RunConfig) -> Command:
    file = Path(config.run_dir).with_suffix(".toml")
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    return commands.start("train", str(file))


def num_lines(config: RunConfig) -> int:
    """Steps trained, those of earlier attempts as well."""
    path = RunDir(Path(config.run_dir)).metrics
    return path.read_bytes().count(b'"kind":"train"') if path.exists() else 0


def reaches(command: Command, config: RunConfig, num: int) -> bool:
    """Whether it trains so many steps before it ends."""
    return command.wait_until(lambda: num_lines(config) >= num, 120.0)


def log(config: RunConfig) -> str:
    path = RunDir(Path(config.run_dir)).log("trainer", 0)
    return path.read_text() if path.exists() else ""


def assert_undisturbed(command: Command, config: RunConfig, inline: RunConfig) -> None:
    assert command.wait(180) == 0, command.output
    assert [line["step"] for line in lines(config)] == list(range(1, len(losses(inline)) + 1))
    assert losses(config) == losses(inline)
    assert same_weights(config, inline)


def test_servers_killed_again_and_again_while_others_return(
    commands: Commands, inline: RunConfig, returning: list[Returning], tmp_path: Path
) -> None:
    config = remote_config(inline, tmp_path / "run", [server.url for server in returning])
    trainer = start(commands, config)
    for number in range(10):
        assert reaches(trainer, config, 10 * (number + 1)), trainer.output
        victim = returning[number % 2]
        victim.kill()
        victim.start()  # and be killed again, ready or not, while the other one returns
    assert_undisturbed(trainer, config, inline)
    assert lines(config)[-1]["stream"]["server_deaths"] >= 3


def test_a_server_that_hangs_is_left_alone_until_it_is_well(
    commands: Commands, inline: RunConfig, returning: list[Returning], tmp_path: Path
) -> None:
    config = remote_config(inline, tmp_path / "run", [server.url for server in returning])
    trainer = start(commands, config)
    assert reaches(trainer, config, 10), trainer.output
    hanging = returning[0].command
    hanging.send_signal(signal.SIGSTOP)
    try:
        assert trainer.wait_until(lambda: "does not answer /healthz" in log(config)), trainer.output
        assert reaches(trainer, config, num_lines(config) + 2), "the other server goes on"
    finally:
        hanging.send_signal(signal.SIGCONT)
    assert_undisturbed(trainer, config, inline)


def test_the_whole_pool_may_be_down_for_ten_seconds(
    commands: Commands, inline: RunConfig, returning: list[Returning], tmp_path: Path
) -> None:
    config = remote_config(inline, tmp_path / "run", [server.url for server in returning])
    trainer = start(commands, config)
    assert reaches(trainer, config, 10), trainer.output
    for server in returning:
        server.kill()
    time.sleep(10)
    trained = num_lines(config)
    for server in returning:
        server.start()
    assert_undisturbed(trainer, config, inline)
    assert trained < len(losses(inline)), "the premise: it had to wait"
    assert "no server has been up for" in log(config)


@pytest.mark.parametrize("transport", ["http", "file", "gloo"])
def test_a_trainer_killed_ten_times_ends_where_an_undisturbed_one_does(
    commands: Commands, inline: RunConfig, target_servers: list[Served], tmp_path: Path, transport: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    config = remote_config(
        inline,
        tmp_path / "run",
        [server.url for server in target_servers],
        transport__kind=transport,
        transport__directory=str(shared),
        training__checkpoint_every=5,
        pool__lease_s=2.0,
    )
    draw = random.Random(transport)
    for _ in range(10):
        before, trainer = num_lines(config), start(commands, config)
        assert reaches(trainer, config, before + draw.randint(1, 12)), trainer.output
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert_undisturbed(start(commands, config), config, inline)
    assert {line["attempt"] for line in lines(config)} > {1}, "the premise: it went on from checkpoints"
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("transport", ["http", "file", "gloo"])
def test_a_lease_that_runs_out_is_replaced_by_another(
    commands: Commands, inline: RunConfig, target_servers: list[Served], tmp_path: Path, transport: str
) -> None:
    config = remote_config(
        inline, tmp_path / "run", [target_servers[0].url], pool__lease_s=1.0, transport__kind=transport
    )
    trainer = start(commands, config)
    assert reaches(trainer, config, 10), trainer.output
    trainer.send_signal(signal.SIGSTOP)
    time.sleep(4)
    trainer.send_signal(signal.SIGCONT)
    assert_undisturbed(trainer, config, inline)
    assert "another is opened" in log(config)


def test_a_row_that_kills_every_server_it_meets_ends_the_run_and_is_named(
    commands: Commands, inline: RunConfig, tiny_target: Path, tmp_path: Path
) -> None:
    """The proxy kills a server as soon as row 21 is asked of it."""
    servers = start_servers(commands, tiny_target, tmp_path, 5)
    kills = [
        {
            "kind": "signal",
            "signum": signal.SIGKILL,
            "at_row": 0,
            "server": i,
            "position": 21,
            "pids": [server.command.pid],
        }
        for i, server in enumerate(servers)
    ]
    with fault_proxy([server.url for server in servers], kills) as proxy:
        config = remote_config(inline, tmp_path / "run", proxy.urls, pool__all_down_timeout_s=20.0)
        trainer = start(commands, config)
        assert trainer.wait(120) == 1, trainer.output
        proxy.end()
    assert len(proxy.done) == 4, "three deaths, and one alone; the rest of the pool lives"
    assert "row 21 was in flight at 4 deaths of servers" in trainer.output.replace("\n", " ")
    assert "of samples" in trainer.output.replace("\n", " ")
    living = [server for i, server in enumerate(servers) if i not in {kill["server"] for kill in proxy.done}]
    assert len(living) == 1
    for server in living:
        server.kill()
    assert 1 <= num_lines(config) <= 11


def test_signals_to_everything_in_any_order_end_everything(
    commands: Commands, inline: RunConfig, tiny_target: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    for number in range(20):
        servers = start_servers(commands, tiny_target, tmp_path / f"servers-{number}", 2)
        transport = ("http", "file", "gloo")[number % 3]
        config = remote_config(
            inline,
            tmp_path / f"run-{number}",
            [server.url for server in servers],
            training__num_epochs=500,
            transport__kind=transport,
        )
        trainer = start(commands, config)
        assert reaches(trainer, config, draw.randint(1, 6)), trainer.output
        everything = [trainer, *(server.command for server in servers)]
        draw.shuffle(everything)
        for command in everything:
            command.send_signal(signal.SIGTERM)
            time.sleep(draw.choice((0.0, 0.0, 0.05, 0.5)))
        deadline = time.monotonic() + ENDS_WITHIN_S
        for command in everything:
            code = command.wait(max(0.1, deadline - time.monotonic()))
            assert code in (0, 128 + signal.SIGTERM), (transport, number, command.output)
        assert "checkpoint" in trainer.output


def test_what_was_killed_leaves_no_file_in_shared_memory_after_the_next_start(
    commands: Commands, inline: RunConfig, returning: list[Returning], tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="chaos-") as shared:
        changes = {"transport__kind": "file", "transport__directory": shared, "training__checkpoint_every": 5}
        config = remote_config(inline, tmp_path / "run", [server.url for server in returning], **changes)
        for _ in range(3):
            trainer = start(commands, config)
            assert reaches(trainer, config, num_lines(config) + 7), trainer.output
            for command in (trainer, *(server.command for server in returning)):
                command.send_signal(signal.SIGKILL)
            trainer.wait()
            left = [path for path in Path(shared).rglob("*") if path.is_file()]
            assert left, "the premise: who is killed clears nothing away"
            for server in returning:
                server.kill()
                server.start()
        assert_undisturbed(start(commands, config), config, inline)
        assert list(Path(shared).iterdir()) == []
