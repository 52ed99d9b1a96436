"""Which processes a run has and which device each is on: planned before any is started, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.config.loading import build_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.launch.local import config_of_only_trainer, needs_supervisor
from paceline.launch.plan import config_on, plan_processes
from whole_run import run_table


def config(target: str = "inline", **changes: object) -> RunConfig:
    """A run whose devices are all chosen by the plan, unless `changes` say otherwise."""
    own = {"target__device": "auto", "training__device": "auto", "placement__target": target}
    if target == "urls":
        own["placement__urls"] = ["http://a:1", "http://b:1"]
    if target == "recorded":
        own["data__recorded"] = "features"
    return build_config(run_table(Path("run"), Path("target"), Path("data"), **own | changes))


def devices(config: RunConfig, num_gpus: int) -> dict[str, str]:
    """Name of each process -> its devices."""
    return {one.name: "+".join(one.devices) for one in plan_processes(config, num_gpus)}


@pytest.mark.parametrize("target", ["inline", "recorded"])
def test_each_trainer_has_a_gpu_of_its_own(target: str) -> None:
    planned = devices(config(target, placement__num_trainers=3), 4)
    assert planned == {"trainer-0": "cuda:0", "trainer-1": "cuda:1", "trainer-2": "cuda:2"}


def test_trainers_take_the_gpus_that_no_server_has() -> None:
    both = {"placement__num_servers": 2, "placement__num_trainers": 2}
    assert devices(config("servers", **both), 4) == {
        "server-0": "cuda:0",
        "server-1": "cuda:1",
        "trainer-0": "cuda:2",
        "trainer-1": "cuda:3",
    }
    named = config("servers", **both, placement__server_devices=["cuda:3", "cuda:1"])
    assert devices(named, 4) == {
        "server-0": "cuda:3",
        "server-1": "cuda:1",
        "trainer-0": "cuda:0",
        "trainer-1": "cuda:2",
    }
    one = config("servers", target__device="cuda", placement__num_trainers=2)
    assert devices(one, 3) == {"server-0": "cuda", "trainer-0": "cuda:1", "trainer-1": "cuda:2"}


def test_servers_of_several_gpus_leave_the_rest_to_trainers() -> None:
    planned = devices(config("servers", target__tensor_parallel=2, placement__num_trainers=2), 4)
    assert planned == {"server-0": "cuda:0+cuda:1", "trainer-0": "cuda:2", "trainer-1": "cuda:3"}


def test_without_a_gpu_everything_is_on_the_cpu() -> None:
    assert set(devices(config("servers", placement__num_servers=2, placement__num_trainers=3), 0).values()) == {"cpu"}
    assert devices(config("inline", placement__num_trainers=2), 0) == {"trainer-0": "cpu", "trainer-1": "cpu"}
    chosen = config("inline", training__device="cpu", placement__num_trainers=2)
    assert devices(chosen, 8) == {"trainer-0": "cpu", "trainer-1": "cpu"}


def test_servers_elsewhere_take_no_gpu_of_this_host() -> None:
    planned = devices(config("urls", placement__num_trainers=2), 2)
    assert planned == {
        "server-0": "its own",
        "server-1": "its own",
        "trainer-0": "cuda:0",
        "trainer-1": "cuda:1",
    }


def test_devices_that_are_named_are_taken_as_they_are() -> None:
    named = config("inline", placement__num_trainers=2, placement__trainer_devices=["cuda:5", "cpu"])
    assert devices(named, 2) == {"trainer-0": "cuda:5", "trainer-1": "cpu"}


@pytest.mark.parametrize(
    ("changes", "num_gpus", "message"),
    [
        ({"placement__num_trainers": 3}, 2, r"3 trainers need 3 GPUs, 2 are free: this host has 2, servers take 0"),
        (
            {"placement__target": "servers", "placement__num_servers": 2, "placement__num_trainers": 2},
            3,
            r"2 trainers need 2 GPUs, 1 are free: this host has 3, servers take 2",
        ),
        ({"placement__num_trainers": 2, "target__tensor_parallel": 2}, 3, r"2 trainers need 4 GPUs, 3 are free"),
        ({"placement__num_trainers": 2, "training__device": "cuda"}, 0, r"2 trainers need 2 GPUs, 0 are free"),
        ({"placement__num_trainers": 2, "training__device": "cuda:1"}, 4, r"training.device = 'cuda:1' for 2 trainers"),
        ({"placement__num_trainers": 2, "target__device": "cuda:1"}, 4, r"target.device = 'cuda:1' for the 2 targets"),
        ({"placement__num_trainers": 2, "target__device_map": "auto"}, 4, r"target.device_map = 'auto' for the 2"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_both_values(
    changes: dict[str, object], num_gpus: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_processes(config(**changes), num_gpus)  # type: ignore[arg-type]


def test_a_single_trainer_may_share_the_only_gpu_with_a_server() -> None:
    assert devices(config("servers"), 1) == {"server-0": "cuda:0", "trainer-0": "cuda:0"}
    assert devices(config("servers"), 2) == {"server-0": "cuda:0", "trainer-0": "cuda:1"}
    assert devices(config("inline"), 0) == {"trainer-0": "cpu"}


def test_an_inline_target_follows_its_trainer_and_no_other_does() -> None:
    on = config_on(config("inline"), "cuda:2")
    assert (on.training.device, on.target.device) == ("cuda:2", "cuda:2")
    on = config_on(config("inline", target__device="cuda"), "cuda:2")
    assert on.target.device == "cuda:2"
    on = config_on(config("inline", target__device="cpu"), "cuda:2")
    assert (on.training.device, on.target.device) == ("cuda:2", "cpu")
    on = config_on(config("servers"), "cuda:2")
    assert (on.training.device, on.target.device) == ("cuda:2", "auto")


def test_inline_targets_spread_over_several_gpus_share_none() -> None:
    planned = devices(config("inline", placement__num_trainers=2, target__tensor_parallel=2), 4)
    assert planned == {"trainer-0": "cuda:0+cuda:1", "trainer-1": "cuda:2+cuda:3"}


def test_a_supervisor_is_there_for_more_than_one_process() -> None:
    assert not needs_supervisor(config("inline"))
    assert not needs_supervisor(config("urls"))
    assert needs_supervisor(config("servers"))
    assert needs_supervisor(config("recorded", placement__num_trainers=2))
    alone = config("inline", placement__trainer_devices=["cuda:1"])
    assert config_of_only_trainer(alone).training.device == "cuda:1"
    assert config_of_only_trainer(config("inline")) == config("inline")


def test_ranks_of_another_launcher_are_planned_as_theirs() -> None:
    (trainer,) = plan_processes(config("inline", placement__launcher="external"), 4)
    assert trainer.started_by == "torchrun or Slurm"
    assert "LOCAL_RANK" in trainer.devices[0]
