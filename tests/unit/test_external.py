"""Ranks that torchrun or Slurm starts: what their variables say, and what is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.config.loading import build_config
from paceline.errors import ConfigError
from paceline.launch.external import (
    External,
    check_external,
    check_started_once,
    detect_external,
    external_device,
    first_node,
)
from paceline.launch.rendezvous import Rendezvous
from whole_run import run_table

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
"""As `srun` sets them for the sixth of eight tasks on two nodes."""


def without(variables: dict[str, str], *names: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names} | changes


def test_a_rank_of_torchrun_joins_the_store_of_its_agent() -> None:
    found = detect_external(TORCHRUN)
    assert found == External(Rendezvous(3, 4, "tcp://node-a:29500/attempt-0", hosted=False), 1, "torchrun")
    again = detect_external(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert again.rendezvous.address == "tcp://node-a:29500/attempt-2", "the store still has what died left in it"
    alone = detect_external(without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"))
    assert alone.rendezvous == Rendezvous(3, 4, "tcp://node-a:29500"), "without an agent rank 0 listens"
    assert detect_external(TORCHRUN | {"MASTER_ADDR": "fd00::7"}).rendezvous.address.startswith("tcp://[fd00::7]:29500")


def test_what_torchrun_really_sets_is_understood(tmp_path: Path) -> None:
    program = tmp_path / "show.py"
    program.write_text(
        "import json, os, pathlib\n"
        "place = pathlib.Path(__file__).with_name(os.environ['RANK'] + '.json')\n"
        "place.write_text(json.dumps(dict(os.environ)))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, capture_output=True, check=True, timeout=120, env=environment)
    found = [detect_external(json.loads(file.read_text())) for file in sorted(tmp_path.glob("*.json"))]
    assert [one.rendezvous.rank for one in found] == [0, 1]
    for one in found:
        assert (one.rendezvous.num_ranks, one.local_rank) == (2, one.rendezvous.rank)
        assert not one.rendezvous.hosted
    assert len({one.rendezvous.address for one in found}) == 1


def test_a_task_of_slurm_meets_the_others_on_the_first_node_of_its_step() -> None:
    found = detect_external(SLURM)
    assert (found.rendezvous.rank, found.rendezvous.num_ranks, found.local_rank) == (5, 8, 1)
    assert found.rendezvous.hosted
    host, port = found.rendezvous.address.removeprefix("tcp://").split(":")
    assert host == "gpu07"
    assert 15_000 <= int(port) < 30_000
    assert detect_external(SLURM | {"SLURM_PROCID": "0"}).rendezvous.address == found.rendezvous.address
    other_step = detect_external(SLURM | {"SLURM_STEP_ID": "1"}).rendezvous.address
    assert other_step != found.rendezvous.address, "two steps of a job may run on one node"
    smaller = detect_external(SLURM | {"SLURM_STEP_NUM_TASKS": "6"})
    assert smaller.rendezvous.num_ranks == 6, "srun -n 6 in a job of 8"
    chosen = detect_external(SLURM | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert chosen.rendezvous.address == "tcp://10.1.1.1:4000"
    only_address = without(SLURM, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST")
    assert "tcp://10.0.0.7:" in detect_external(only_address).rendezvous.address


def test_torchrun_started_by_slurm_counts_as_torchrun() -> None:
    assert detect_external(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[007-010,12],cpu3", "gpu007"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]n[05,07]", "rack2n05"),
        ("x-1[9]-y", "x-19-y"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, r"nobody has started this process as a rank: torchrun sets RANK, .*; srun sets SLURM_PROCID"),
        (without(TORCHRUN, "MASTER_PORT", "LOCAL_RANK"), r"torchrun sets .*, but LOCAL_RANK, MASTER_PORT is missing"),
        (without(TORCHRUN, "RANK"), r"but RANK is missing: start every rank with torchrun"),
        (without(SLURM, "SLURM_LOCALID"), r"Slurm sets .*, but SLURM_LOCALID is missing: start every rank with srun"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, r"a variable of torchrun is no number: .*'two'"),
        (TORCHRUN | {"RANK": "4"}, r"torchrun says that this is rank 4 of 4"),
        (
            without(SLURM, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"),
            r"none of SLURM_STEP_NODELIST.*export MASTER_ADDR",
        ),
    ],
)
def test_what_is_missing_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect_external(environ)


def test_a_command_that_starts_its_own_ranks_is_refused_under_torchrun() -> None:
    with pytest.raises(ConfigError, match=r"torchrun has started this command 4 times.*placement.launcher=external"):
        check_started_once(TORCHRUN)
    check_started_once(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"})
    check_started_once({})


def test_placements_that_ranks_of_others_cannot_have_are_refused() -> None:
    def external(**changes: object) -> None:
        table = run_table(Path("run"), Path("t"), Path("d"), placement__launcher="external", **changes)
        check_external(build_config(table), 4)

    external()
    external(placement__num_trainers=4)
    with pytest.raises(ConfigError, match=r'target = "servers" with placement.launcher = "external".*paceline serve'):
        external(placement__target="servers")
    with pytest.raises(ConfigError, match=r"num_trainers = 2, but the launcher has started 4 ranks"):
        external(placement__num_trainers=2)


@pytest.mark.parametrize(
    ("environ", "changes", "num_gpus", "device"),
    [
        (TORCHRUN, {}, 8, "cuda:1"),
        (TORCHRUN, {}, 0, "cpu"),
        (TORCHRUN, {"training__device": "cpu"}, 8, "cpu"),
        (TORCHRUN, {"training__device": "cuda:7"}, 8, "cuda:7"),
        (SLURM, {}, 4, "cuda:1"),
        (SLURM, {}, 1, "cuda:0"),
        (
            TORCHRUN,
            {"placement__num_trainers": 4, "placement__trainer_devices": ["cuda:0", "cuda:1", "cuda:0", "cuda:3"]},
            4,
            "cuda:3",
        ),
    ],
)
def test_a_rank_is_on_the_gpu_of_its_local_rank_unless_one_is_set(
    environ: dict[str, str], changes: dict[str, object], num_gpus: int, device: str
) -> None:
    table = run_table(Path("run"), Path("t"), Path("d"), **{"training__device": "auto"} | changes)
    assert external_device(build_config(table), detect_external(environ), num_gpus) == device


def test_more_ranks_than_gpus_on_a_host_are_refused_with_both_numbers() -> None:
    config = build_config(run_table(Path("run"), Path("t"), Path("d"), training__device="auto"))
    with pytest.raises(ConfigError, match="local rank 1 needs GPU 1, this process sees 1"):
        external_device(config, detect_external(TORCHRUN), 1)
