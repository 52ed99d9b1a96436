"""What a run asks of a Ray cluster, what is said when it is not there, and what every node must have; needs no Ray."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.config.loading import build_config
from paceline.config.placement import RayConfig
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.launch.plan import plan_processes
from paceline.launch.ray.actors import Whereabouts
from paceline.launch.ray.bundles import ClusterResources, plan_bundles
from paceline.launch.ray.cluster import check_ray
from paceline.launch.ray.followed import FollowedServer
from paceline.launch.restarts import ServerLife
from paceline.version import VERSION


def config(
    target: dict[str, Any] | None = None, training: dict[str, Any] | None = None, /, **placement: Any
) -> RunConfig:
    return build_config(
        {
            "run_dir": "runs/x",
            "target": {"model": "m", **(target or {})},
            "data": {"train": "t.jsonl", "recorded": "r"} if placement.get("target") == "recorded" else {"train": "t"},
            "drafts": {"a": {"algorithm": "eagle3"}},
            "training": training or {},
            "placement": {"launcher": "ray", **placement},
        }
    )


def asked(config: RunConfig, has_gpus: bool = True) -> list[str]:
    return [str(bundle) for bundle in plan_bundles(config, has_gpus)]


def test_a_server_is_one_bundle_of_its_gpus_and_a_trainer_rank_one_of_a_gpu():
    run = config({"tensor_parallel": 4}, target="servers", num_servers=2, num_trainers=2)
    servers = ["server-0 (4 CPU, 4 GPU)", "server-1 (4 CPU, 4 GPU)"]
    assert asked(run) == [*servers, "trainer-0 (1 CPU, 1 GPU)", "trainer-1 (1 CPU, 1 GPU)"]
    assert [bundle.device for bundle in plan_bundles(run, has_gpus=True)] == ["cuda:0"] * 4


def test_without_gpus_or_where_the_cpu_is_asked_for_bundles_are_of_cpus():
    run = config({"tensor_parallel": 2}, target="servers")
    assert asked(run, has_gpus=False) == ["server-0 (2 CPU)", "trainer-0 (1 CPU)"]
    assert asked(config({"device": "cpu"}, target="servers")) == ["server-0 (1 CPU)", "trainer-0 (1 CPU, 1 GPU)"]
    assert [bundle.device for bundle in plan_bundles(run, has_gpus=False)] == ["cpu", "cpu"]


def test_a_trainer_with_the_target_inside_has_room_for_both():
    assert asked(config({"tensor_parallel": 2}, num_trainers=2)) == [
        "trainer-0 (2 CPU, 2 GPU)",
        "trainer-1 (2 CPU, 2 GPU)",
    ]
    assert asked(config(target="recorded")) == ["trainer-0 (1 CPU, 1 GPU)"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (config(target="servers", server_devices=["cuda:0"]), r"placement\.server_devices = \['cuda:0'\]"),
        (config(trainer_devices=["cuda:0"]), r"placement\.trainer_devices = \['cuda:0'\]"),
        (config({"device": "cuda:1"}), r"target\.device = 'cuda:1'"),
        (config({}, {"device": "cuda:1"}), r"training\.device = 'cuda:1'"),
    ],
)
def test_devices_are_chosen_by_ray_and_not_named(run: RunConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        plan_bundles(run, has_gpus=True)


def test_what_is_missing_is_said_by_resource_and_by_bundle():
    bundles = plan_bundles(config({"tensor_parallel": 4}, target="servers", num_servers=2), has_gpus=True)
    nodes = [{"CPU": 8.0, "GPU": 4.0, "memory": 1.0}, {"CPU": 8.0, "GPU": 2.0}]
    small = ClusterResources({"CPU": 3.0}, nodes)
    assert small.missing(bundles) == "CPU: 9 asked for, 3 free of 16; GPU: 9 asked for, 0 free of 6"
    assert small.can_never_hold(bundles)
    large = ClusterResources({}, [nodes[0]] * 3)
    assert not large.can_never_hold(bundles), "it is only taken at the moment"
    scattered = ClusterResources({"CPU": 64.0, "GPU": 16.0}, [{"CPU": 8.0, "GPU": 2.0}] * 8)
    assert scattered.can_never_hold(bundles)
    for rank in (0, 1):
        assert f"no node is large enough for server-{rank} (4 CPU, 4 GPU)" in scattered.missing(bundles)


def test_the_plan_of_a_run_on_ray_shows_bundles():
    here, elsewhere = config(target="servers"), config(target="servers", ray={"address": "auto"})
    assert [one.devices for one in plan_processes(here, num_gpus=0)] == [("bundle 0: 1 CPU",), ("bundle 1: 1 CPU",)]
    server, trainer = plan_processes(elsewhere, num_gpus=0)
    assert (server.devices, server.started_by) == (("bundle 0: 1 CPU, 1 GPU",), "Ray (auto)")
    assert "its node" in server.address
    assert trainer.devices == ("bundle 1: 1 CPU, 1 GPU",)
    with pytest.raises(ConfigError, match="Ray chooses the devices"):
        plan_processes(config(trainer_devices=["cpu"]), num_gpus=0)


def test_without_ray_its_launcher_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    check_ray(RayConfig())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "paceline\[ray\]"'):
        check_ray(RayConfig())


def test_addresses_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="ray job submit"):
        check_ray(RayConfig(address="ray://10.0.0.1:10001"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_ray(RayConfig(address="auto"))
    with pytest.raises(ConfigError, match="RAY_ADDRESS names a Ray cluster"):
        check_ray(RayConfig())


def test_a_node_must_see_the_run_directory_and_have_the_same_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.launch.ray.actors._SEEN_WITHIN_S", 0.0)
    nonce = tmp_path / "nonce"
    here = Whereabouts(str(tmp_path), str(nonce), "words", VERSION, None)
    assert here.problem("10.0.0.3") == (
        f"node 10.0.0.3 does not see the run directory {tmp_path}: set run_dir to a directory on a file system that "
        "all nodes of the cluster share"
    )
    nonce.write_text("others")
    assert here.problem("10.0.0.3") is not None, "another directory of the same name"
    nonce.write_text("words")
    assert here.problem("10.0.0.3") is None
    elsewhere = Whereabouts(str(tmp_path / "gone"), str(nonce), "words", VERSION, None)
    assert "has no directory" in str(elsewhere.problem("10.0.0.3"))
    other = Whereabouts(str(tmp_path), str(nonce), "words", "0.0.9", None)
    assert f"has paceline {VERSION}, the command has 0.0.9" in str(other.problem("10.0.0.3"))


def test_a_server_that_is_silent_for_long_may_take_its_time_to_be_placed_elsewhere(tmp_path: Path):
    placement = config(target="servers", start_timeout_s=1.0).placement
    life = ServerLife("server-0", tmp_path / "log", placement, started=time.monotonic() - 1000)
    assert life.is_late(), "the premise"
    life.ready("http://10.0.0.3:1")
    server = FollowedServer("server-0", actor=None, life=life)
    server._on_silence()
    server._go_on()
    assert (life.url, server.is_silent, life.num_restarts) == (None, True, 0)
    server.lost = "its node died"
    server._on_silence()
    assert life.given_up
    server._go_on()
