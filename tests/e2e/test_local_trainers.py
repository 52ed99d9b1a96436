"""Several trainers of one command, or under torchrun and Slurm: one training, whose first failure ends it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forking import Command, Commands
from own_processes import alive, children_of, num_steps, start, write_config
from paceline.cli.main import app
from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.errors import ConfigError
from paceline.launch.run import load_resolved
from whole_run import QuietSignals, losses, run, run_config, same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = {"training__rows_per_step": 4, "training__num_epochs": 2, "placement__num_trainers": 2}
ENDLESS = {"training__num_epochs": 500}
ROOT = Path(__file__).resolve().parents[2]


def trainers_config(run_dir: Path, target: Path, data: Path, **changes: object) -> RunConfig:
    return run_config(run_dir, target, data, **SETTINGS | changes)


def wait_for_steps(command: Command, config: RunConfig, num: int) -> dict[str, int]:
    """The processes of the run, once it has trained so many steps."""
    assert command.wait_until(lambda: num_steps(config) >= num), command.output
    return children_of(command.pid)


def wait_gone(commands: Commands, pids: list[int], deadline: float) -> None:
    for pid in pids:
        assert commands.ask("wait_gone", pid, max(deadline - time.monotonic(), 0.1)), f"process {pid} is left"


@pytest.fixture(scope="module")
def two_trainers(
    commands: Commands, tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, data: Path
) -> RunConfig:
    """A finished run of two trainers that one command has started; targets are on the devices of their trainers."""
    directory = tmp_path_factory.mktemp("two")
    devices = {"training__device": "auto", "target__device": "auto", "placement__trainer_devices": ["cpu", "cpu"]}
    config = trainers_config(directory / "run", tiny_target, data, **devices)
    command = start(commands, config, directory)
    assert command.wait(120) == 0, command.output
    assert "finished after step" in command.output
    return config


def test_one_command_trains_on_two_trainers(two_trainers: RunConfig, tiny_target: Path, data: Path) -> None:
    run_dir = Path(two_trainers.run_dir)
    for rank in (0, 1):
        assert f"trainer-{rank} " in (run_dir / "logs" / f"trainer-{rank}.log").read_text()
    assert "trainers on cpu, cpu" in (run_dir / "logs" / "supervisor-0.log").read_text()
    kept = build_config(load_resolved(RunDir(run_dir)))
    assert kept == two_trainers, "the devices of a rank are no settings of the run"
    one = run_config(run_dir.with_name("one"), tiny_target, data, **SETTINGS | {"placement__num_trainers": 1})
    run(one)
    assert len(losses(one)) > 4
    for ours, theirs in zip(losses(two_trainers), losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_plan_names_every_process(
    tiny_target: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, placement__target="servers")
    for verb in (["plan"], ["train", "--plan"]):
        app([*verb, str(write_config(config, tmp_path))], obj=QuietSignals(), standalone_mode=False)
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("server-0", "trainer-0", "trainer-1")), shown
    assert not (tmp_path / "run" / "logs").exists(), "and starts none"


def test_a_killed_trainer_ends_the_run_with_its_servers_and_is_named(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    config = trainers_config(
        tmp_path / "run",
        tiny_target,
        data,
        placement__target="servers",
        transport__kind="file",
        transport__directory=str(shared),
        **ENDLESS,
    )
    command = start(commands, config, tmp_path)
    pids = wait_for_steps(command, config, 3)
    assert pids.keys() == {"server-0", "trainer-0", "trainer-1"}
    assert len(list(shared.iterdir())) == 2, "each trainer has a directory of its own"
    os.kill(pids["trainer-1"], signal.SIGKILL)
    assert command.wait(30) == 1, command.output
    assert "error: trainer-1 failed first: killed by signal 9" in command.output
    assert not any(alive(pid) for pid in pids.values())
    assert list(shared.iterdir()) == []


def test_the_error_of_the_rank_that_failed_is_the_first_that_is_shown(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, placement__trainer_devices=["cpu", "cuda:77"])
    started = time.monotonic()
    command = start(commands, config, tmp_path)
    assert command.wait() == 1
    assert time.monotonic() - started < 45
    errors = [line for line in command.output.splitlines() if "INFO" not in line]
    assert re.match(r"error: trainer-1 failed first: training.device = 'cuda:77', but this machine has", errors[0])
    assert "cuda:77" in (tmp_path / "run" / "logs" / "trainer-1.log").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_whatever_ends_the_command_ends_all_trainers(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, **ENDLESS)
    command = start(commands, config, tmp_path)
    pids = wait_for_steps(command, config, 3)
    assert pids.keys() == {"trainer-0", "trainer-1"}
    deadline = time.monotonic() + 10
    command.send_signal(signum)
    code = command.wait(10)
    wait_gone(commands, list(pids.values()), deadline)
    if signum == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM, command.output
        assert "stopped after step" in command.output
        assert "error" not in command.output
    else:
        assert code == -signal.SIGKILL


@pytest.mark.long
def test_a_trainer_that_hangs_does_not_outlive_the_deadline(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, **ENDLESS)
    command = start(commands, config, tmp_path)
    pids = wait_for_steps(command, config, 3)
    os.kill(pids["trainer-1"], signal.SIGSTOP)
    deadline = time.monotonic() + 10
    command.send_signal(signal.SIGTERM)
    assert command.wait(12) == 128 + signal.SIGTERM, command.output
    wait_gone(commands, list(pids.values()), deadline)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_trainer_killed_while_another_hangs_ends_the_run(
    commands: Commands, tiny_target: Path, data: Path, tmp_path: Path, rank: int
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, **ENDLESS | {"placement__num_trainers": 3})
    command = start(commands, config, tmp_path)
    pids = wait_for_steps(command, config, 3)
    os.kill(pids["trainer-2"], signal.SIGSTOP)
    os.kill(pids[f"trainer-{rank}"], signal.SIGKILL)
    assert command.wait(30) == 1, command.output
    assert f"error: trainer-{rank} failed first: killed by signal 9" in command.output
    assert not any(alive(pid) for pid in pids.values())


def shown(program: str) -> list[str]:
    """The first command of `program` that docs/torchrun-and-slurm.md shows."""
    page = (ROOT / "docs" / "torchrun-and-slurm.md").read_text(encoding="utf-8")
    line = re.search(rf"^{program} .*$", page, flags=re.MULTILINE)
    assert line is not None
    return shlex.split(line[0])


def start_rank(words: list[str], directory: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables},
    )


def torchrun(config: RunConfig, directory: Path, *options: str) -> subprocess.Popen[str]:
    """The page's command, on a configuration that leaves everything about ranks to the launcher."""
    placement = config.placement.model_copy(update={"launcher": "external", "num_trainers": 1})
    write_config(config.model_copy(update={"placement": placement}), directory)
    words = shown("torchrun")
    assert words[-2:] == ["train", "run.toml"]
    return start_rank([sys.executable, "-m", "torch.distributed.run", *options, *words[1:]], directory)


def rank_of_torchrun(rank: int, directory: Path) -> int:
    """Its process id."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                is_rank = f"\0RANK={rank}\0" in (entry / "environ").read_text()
                if is_rank and (entry / "cwd").readlink() == directory:
                    return int(entry.name)
    raise AssertionError(f"no rank {rank} in {directory}")


def wait_and_kill(process: subprocess.Popen[str], config: RunConfig, directory: Path, num: int) -> None:
    """Kill rank 1 once the run has trained so many steps."""
    while num_steps(config) < num:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(rank_of_torchrun(1, directory), signal.SIGKILL)


@pytest.mark.long
def test_the_pages_torchrun_command_trains_as_one_command_does(
    two_trainers: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data)
    process = torchrun(config, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("finished after step") == 1, "the first rank alone writes on the terminal"
    assert (tmp_path / "run" / "logs" / "trainer-1.log").exists()
    assert losses(config) == losses(two_trainers)
    assert same_weights(config, two_trainers)


@pytest.mark.long
def test_the_pages_slurm_job_trains_as_one_command_does(
    two_trainers: RunConfig, tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    """As two tasks of `srun` would: without Slurm, with the variables that it sets."""
    config = trainers_config(tmp_path / "run", tiny_target, data, placement__launcher="external")
    write_config(config, tmp_path)
    srun, option, program, *words = shown("srun")
    assert (srun, option, program) == ("srun", "--kill-on-bad-exit=1", "paceline")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": port,
    }
    tasks = [
        start_rank(
            [sys.executable, "-m", "paceline.cli", *words],
            tmp_path,
            **variables,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "finished after step" in outputs[0]
    assert losses(config) == losses(two_trainers)
    assert same_weights(config, two_trainers)


@pytest.mark.long
def test_torchrun_names_the_rank_that_was_killed(tiny_target: Path, data: Path, tmp_path: Path) -> None:
    config = trainers_config(tmp_path / "run", tiny_target, data, **ENDLESS)
    process = torchrun(config, tmp_path)
    wait_and_kill(process, config, tmp_path, 3)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    cause = output.partition("Root Cause (first observed failure)")[2]
    assert re.search(r"rank +: 1 ", cause), output
    assert "-9" in cause


@pytest.mark.long
def test_ranks_that_torchrun_starts_anew_go_on_from_the_newest_checkpoint(
    tiny_target: Path, data: Path, tmp_path: Path
) -> None:
    many = {"training__num_epochs": 10, "training__checkpoint_every": 5}
    whole = trainers_config(tmp_path / "whole", tiny_target, data, **many, placement__num_trainers=1)
    run(whole)
    config = trainers_config(tmp_path / "run", tiny_target, data, **many)
    process = torchrun(config, tmp_path, "--max-restarts", "1")
    wait_and_kill(process, config, tmp_path, 12)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(losses(config)) == len(losses(whole))
    assert losses(config)[-1] == pytest.approx(losses(whole)[-1], rel=1e-4)
    assert re.search(r"resumed from \S+/step-000000\d\d as attempt 2", output), output


def test_the_pages_job_script_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "torchrun-and-slurm.md").read_text(encoding="utf-8")
    (script,) = (block for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "#SBATCH" in block)
    file = tmp_path / "job.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert script.startswith("#!/bin/bash\n#SBATCH ")


def test_a_command_that_starts_trainers_itself_is_refused_under_torchrun(
    tiny_target: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(trainers_config(tmp_path / "run", tiny_target, data), tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"add placement\.launcher=external to the command"):
        app(["train", str(file)], obj=QuietSignals(), standalone_mode=False)
    assert not (tmp_path / "run").exists()
