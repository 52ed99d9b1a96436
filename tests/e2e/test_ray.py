"""`placement.launcher = "ray"`: the same run on a Ray cluster, whatever dies in it, and nothing left behind."""

import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from rich.console import Console

from forking import Command, Commands
from paceline.config.run import RunConfig
from paceline.launch.record import RecordOptions, record
from ray_nodes import RayNodes, kill_actor, parent_of, ray_nodes, started
from served import Served
from whole_run import QuietSignals, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__num_epochs": 3, "training__eval_every": 7}
LONG = {**SETTINGS, "training__num_epochs": 20, "training__eval_every": 0}
SERVERS = {"placement__launcher": "ray", "placement__target": "servers"}


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path) -> RunConfig:
    """96 steps in this process."""
    torch.set_num_threads(1)
    config = run_config(tmp_path_factory.mktemp("inline") / "run", tiny_target, data, **SETTINGS)
    assert run(config).status == "finished"
    return config


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """Three nodes, of seven CPUs in all."""
    with ray_nodes(tmp_path_factory.mktemp("ray"), [3, 2, 2]) as nodes:
        yield nodes


def start(commands: Commands, config: RunConfig) -> Command:
    file = Path(config.run_dir).with_suffix(".toml")
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    return commands.start("train", str(file))


def on_ray(inline: RunConfig, run_dir: Path, nodes: RayNodes, **changes: Any) -> RunConfig:
    """A run on the cluster of `nodes`, with servers of its own unless `changes` say otherwise."""
    settings = {**SETTINGS, **SERVERS, "placement__ray__address": nodes.address, **changes}
    settings["transport__directory"] = str(features(run_dir))
    return run_config(run_dir, Path(inline.target.model), Path(inline.data.train).parent, **settings)


def num_steps(config: RunConfig) -> int:
    path = Path(config.run_dir) / "metrics.jsonl"
    return path.read_bytes().count(b'"kind":"train"') if path.exists() else 0


def assert_equal_runs(command: Command, config: RunConfig, inline: RunConfig) -> None:
    assert command.wait(120) == 0, command.output
    assert losses(config) == losses(inline)
    assert same_weights(config, inline)
    assert "finished after step" in command.output, "what rank 0 writes is seen here"


def assert_gone(commands: Commands, pids: list[int], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    for pid in pids:
        left_s = max(deadline - time.monotonic(), 0.1)
        assert commands.ask("wait_gone", pid, left_s), f"process {pid} is left"


def features(run_dir: Path) -> Path:
    """Where a run's features lie on their way."""
    directory = run_dir.with_name("features")
    directory.mkdir(exist_ok=True)
    return directory


def test_on_a_cluster_of_its_own_a_run_is_the_one_that_it_is_without_ray(
    commands: Commands, inline: RunConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {**SETTINGS, **SERVERS, "placement__num_servers": 2}
    changes["transport__directory"] = str(features(tmp_path / "run"))
    config = run_config(tmp_path / "run", Path(inline.target.model), Path(inline.data.train).parent, **changes)
    command = start(commands, config)
    assert command.wait_until(lambda: num_steps(config) > 1, 120), command.output
    pids = [started(command, "server-0"), started(command, "trainer-0")]
    actors = [parent_of(pid) for pid in pids]
    words = Path(f"/proc/{pids[1]}/cmdline").read_bytes().decode().split("\0")
    token_file = Path(words[words.index("--token-file") + 1])
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text()
    everybodys = [entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline") if entry.exists()]
    assert_equal_runs(command, config, inline)
    assert_gone(commands, [*pids, *actors], 10.0)
    assert not token_file.parent.exists()
    assert json.loads((tmp_path / "run" / "servers.json").read_text()) == {"servers": []}
    assert len(token) >= 32
    assert token not in command.output
    assert not any(token.encode() in words for words in everybodys), "a secret stays in its file"
    for file in [*(tmp_path / "run").rglob("*"), *Path("/tmp/ray/session_latest/logs").rglob("*")]:
        assert not file.is_file() or token.encode() not in file.read_bytes(), file
    assert "travel by file" in command.output
    assert list(features(tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "run" / "nonce").exists()


@pytest.mark.long
@pytest.mark.parametrize("target", ["servers", "inline", "urls", "recorded"])
def test_wherever_the_target_is_a_cluster_of_three_nodes_gives_the_losses_of_one_process(
    nodes: RayNodes, inline: RunConfig, target_servers: list[Served], tmp_path: Path, target: str
) -> None:
    changes: dict[str, Any] = {
        "servers": {"placement__num_servers": 3},
        "inline": {},
        "urls": {"placement__urls": [server.url for server in target_servers]},
        "recorded": {"data__recorded": str(tmp_path / "recording")},
    }[target]
    if target == "recorded":
        options = RecordOptions(tmp_path / "recording", False)
        record(inline, options, QuietSignals(), Console(file=io.StringIO()))
    config = on_ray(inline, tmp_path / "run", nodes, placement__target=target, **changes)
    command = start(nodes.commands, config)
    assert_equal_runs(command, config, inline)
    if target == "servers":
        for rank in range(3):
            pid = started(command, f"server-{rank}")
            assert_gone(nodes.commands, [pid], 10.0)
    assert nodes.groups() == [], "the placement group is given back"


RANKS = {"training__rows_per_step": 4, "placement__num_trainers": 2}


@pytest.mark.long
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_three_servers_and_several_trainers_train_as_they_do_without_ray(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path, sequence_parallel: int
) -> None:
    """Two trainers, or two groups of two that train each row together: 3 servers x 2 trainers x sequence parallel 2."""
    ranks = {**SETTINGS, **RANKS, "training__sequence_parallel": sequence_parallel, "data__row_tokens": 256}
    ranks |= {"placement__num_trainers": 2 * sequence_parallel, "placement__target": "servers"}
    here = run_config(tmp_path / "here", Path(inline.target.model), Path(inline.data.train).parent, **ranks)
    command = start(nodes.commands, here)
    assert command.wait(200) == 0, command.output
    config = on_ray(inline, tmp_path / "run", nodes, **ranks, placement__num_servers=3)
    command = start(nodes.commands, config)
    assert command.wait(200) == 0, command.output
    assert len(losses(config)) > 6
    assert losses(config) == losses(here)
    assert same_weights(config, here)
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    names = [f"server-{rank}.log" for rank in range(3)] + [f"trainer-{rank}.log" for rank in range(2)]
    assert {*names, "supervisor-0.log"} <= logs


@pytest.mark.long
def test_one_of_two_trainers_that_is_killed_ends_the_run_and_is_named_first(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, **{**LONG, **RANKS})
    command = start(nodes.commands, config)
    assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    pids = [started(command, name) for name in ("trainer-1", "trainer-0", "server-0")]
    os.kill(pids[0], signal.SIGKILL)
    assert command.wait(30) == 1, command.output
    assert "trainer-1 failed first: killed by signal 9; the last lines of" in command.output
    assert_gone(nodes.commands, pids, 5.0)


@pytest.mark.long
def test_features_are_recorded_on_a_cluster_as_they_are_without_one(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path
) -> None:
    options = RecordOptions(tmp_path / "here", False)
    record(inline, options, QuietSignals(), Console(file=io.StringIO()))
    config = on_ray(inline, tmp_path / "run", nodes, placement__num_servers=2, placement__num_trainers=2)
    file = tmp_path / "record.toml"
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True))))
    command = nodes.commands.start("record", str(file), "--output", str(tmp_path / "there"))
    assert command.wait(120) == 0, command.output
    assert "complete" in command.output
    shards = [sorted(path.read_bytes() for path in (tmp_path / of).rglob("*.safetensors")) for of in ("here", "there")]
    assert len(shards[0]) >= 1
    assert sum(map(len, shards[0])) == sum(map(len, shards[1]))


@pytest.mark.long
@pytest.mark.parametrize("what", ["process", "actor"])
def test_a_server_that_is_killed_is_started_anew_by_ray_and_nothing_is_lost(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path, what: str
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, placement__num_servers=2, training__num_epochs=3)
    command = start(nodes.commands, config)
    for rank in (0, 1):
        assert command.wait_until(lambda rank=rank: f"server-{rank} is ready" in command.output)  # type: ignore[misc]
    assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    for number, rank in enumerate((0, 1), start=1):
        pid = started(command, f"server-{rank}")
        os.kill(pid, signal.SIGKILL) if what == "process" else kill_actor(pid)
        assert_gone(nodes.commands, [pid], 5.0)
        assert command.wait_until(lambda number=number: num_steps(config) >= 4 + 8 * number)  # type: ignore[misc]
    assert_equal_runs(command, config, inline)
    assert "is started anew (1 of 5)" in command.output


@pytest.mark.long
@pytest.mark.parametrize("what", ["process", "actor"])
def test_a_trainer_that_is_killed_ends_the_run_and_is_named(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path, what: str
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, **LONG)
    command = start(nodes.commands, config)
    assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    pids = [started(command, "trainer-0"), started(command, "server-0")]
    begin = time.monotonic()
    os.kill(pids[0], signal.SIGKILL) if what == "process" else kill_actor(pids[0])
    assert command.wait(30) == 1, command.output
    assert time.monotonic() - begin < 30
    process, actor = "trainer-0 ended: killed by signal 9; the last lines of", "Ray has lost the actor of trainer-0"
    assert (process if what == "process" else actor) in command.output
    assert_gone(nodes.commands, pids, 5.0)


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_command_ends_its_processes_on_every_node(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path, signum: signal.Signals
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, **LONG, placement__num_servers=2)
    command = start(nodes.commands, config)
    assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    pids = [started(command, name) for name in ("trainer-0", "server-0", "server-1")]
    actors = [parent_of(pid) for pid in pids]
    command.send_signal(signum)
    assert command.wait(20) == (-signum if signum == signal.SIGKILL else 128 + signum), command.output
    assert_gone(nodes.commands, [*pids, *actors], 20.0)
    if signum == signal.SIGKILL:
        again = start(nodes.commands, config)
        assert again.wait_until(lambda: num_steps(config) >= 8), "there is room again"
        again.send_signal(signal.SIGTERM)
        assert again.wait(20) == 128 + signal.SIGTERM
        assert list(features(tmp_path / "run").iterdir()) == [], "the next start removes what was left"
    else:
        assert "written in" in command.output, "it has saved"
        assert list(features(tmp_path / "run").iterdir()) == []


@pytest.mark.long
def test_a_command_killed_on_a_cluster_of_its_own_takes_the_cluster_with_it(
    commands: Commands, inline: RunConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {**LONG, **SERVERS}
    config = run_config(tmp_path / "run", Path(inline.target.model), Path(inline.data.train).parent, **changes)
    command = start(commands, config)
    assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    pids = [started(command, "trainer-0"), started(command, "server-0")]
    workers = [parent_of(pid) for pid in pids]
    raylet = parent_of(workers[0])
    assert b"raylet" in Path(f"/proc/{raylet}/cmdline").read_bytes(), "the premise"
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert_gone(commands, [*pids, *workers, raylet], 20.0)


@pytest.mark.long
def test_room_that_never_comes_is_named_at_once_and_in_the_end(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, placement__num_servers=9, placement__start_timeout_s=3.0)
    command = start(nodes.commands, config)
    assert command.wait(60) == 1
    assert "the Ray cluster is too small (CPU: 10 asked for, 7 free of 7)" in command.output
    assert "no room in the Ray cluster within 3 s (placement.start_timeout_s): CPU: 10 asked for" in command.output
    wide = on_ray(inline, tmp_path / "wide", nodes, target__tensor_parallel=4, placement__start_timeout_s=1.0)
    command = start(nodes.commands, wide)
    assert command.wait(60) == 1
    assert "no node is large enough for server-0 (4 CPU)" in command.output


@pytest.mark.long
def test_a_wait_for_room_ends_when_there_is_some_and_can_be_interrupted(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, placement__num_servers=8)
    waiting = start(nodes.commands, config)
    assert waiting.wait_until(lambda: "is too small" in waiting.output)
    assert waiting.wait_until(lambda: "waiting 30 s for resources: CPU: 9 asked for, 7 free of 7" in waiting.output)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(15) == 128 + signal.SIGTERM, waiting.output
    waiting = start(nodes.commands, config)
    assert waiting.wait_until(lambda: "is too small" in waiting.output)
    node = nodes.add_node(2)
    try:
        assert_equal_runs(waiting, config, inline)
    finally:
        nodes.remove_node(node)


@pytest.mark.long
def test_servers_of_a_node_that_dies_are_placed_on_another(nodes: RayNodes, inline: RunConfig, tmp_path: Path) -> None:
    """A node of five CPUs joins, so that everything is packed there, and dies."""
    changes = {**LONG, "placement__num_servers": 4}
    one = run_config(tmp_path / "one", Path(inline.target.model), Path(inline.data.train).parent, **LONG)
    assert run(one).status == "finished"
    config = on_ray(inline, tmp_path / "run", nodes, **changes)
    doomed = nodes.add_node(4)
    command = start(nodes.commands, config)
    try:
        for rank in range(4):
            assert command.wait_until(lambda rank=rank: f"server-{rank} is ready" in command.output)  # type: ignore[misc]
        assert command.wait_until(lambda: num_steps(config) >= 4), command.output
    finally:
        nodes.remove_node(doomed)
    assert_equal_runs(command, config, one)
    assert "its Ray actor was lost" in command.output


@pytest.mark.long
def test_a_server_that_cannot_start_ends_the_run_with_its_last_lines(
    nodes: RayNodes, inline: RunConfig, tmp_path: Path
) -> None:
    config = on_ray(inline, tmp_path / "run", nodes, target__attention="flash_attention_2")
    command = start(nodes.commands, config)
    assert command.wait(90) == 1
    assert "server-0 ended while it was starting (exit code 1)" in command.output
    assert "flash" in command.output.lower()


@pytest.mark.long
def test_the_example_of_the_page_runs_as_a_job_of_the_cluster_would(
    nodes: RayNodes, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    """Its configuration and its command, on a small target; a job has the cluster's address in RAY_ADDRESS."""
    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text(encoding="utf-8")
    block = page.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "run.toml").write_text(block)
    command = "paceline train run.toml placement.ray.address=auto"
    assert page.count(command) == 2
    changes = {
        "run_dir": tmp_path / "run",
        "target.model": tiny_target,
        "target.dtype": "float32",
        "data.train": data / "train.jsonl",
        "data.eval": data / "eval.jsonl",
        "data.row_tokens": 128,
        "data.cache_dir": tmp_path / "prepared",
        "drafts.eagle.num_depths": 3,
        "drafts.eagle.vocab_size": 64,
        "training.dtype": "float32",
        "training.num_threads": 1,
    }
    words = command.replace("run.toml", str(tmp_path / "run.toml")).split()[1:]
    job = nodes.commands.start(*words, *(f"{name}={value}" for name, value in changes.items()))
    assert job.wait(150) == 0, job.output
    assert "server-0 (1 CPU), server-1 (1 CPU), trainer-0 (1 CPU), trainer-1 (1 CPU)" in job.output
    assert "finished after step" in job.output


@pytest.mark.long
def test_a_cluster_that_is_not_there_is_an_error_at_once(commands: Commands, inline: RunConfig, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**SETTINGS, **SERVERS, "placement__ray__address": "127.0.0.1:9"}
    config = run_config(tmp_path / "run", Path(inline.target.model), Path(inline.data.train).parent, **changes)
    command = start(commands, config)
    assert command.wait(30) == 1
    assert "cannot connect to the Ray cluster at placement.ray.address = '127.0.0.1:9'" in command.output
