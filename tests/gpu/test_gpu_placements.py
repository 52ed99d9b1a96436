"""Whole runs on two GPUs: target on one, trainer on the other, with the losses of one GPU that does both."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forking import Commands
from paceline.config.run import RunConfig
from served import Served, ready
from tiny import save_tiny_target
from whole_run import losses, run, run_config, same_weights

pytestmark = [pytest.mark.gpu2, pytest.mark.filterwarnings("ignore::UserWarning")]
SETTINGS = {
    "target__device": "cuda:1",
    "target__dtype": "bfloat16",
    "training__device": "cuda:1",
    "training__dtype": "bfloat16",
    "training__deterministic": True,
    "training__eval_every": 5,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert torch.cuda.device_count() >= 2, "these tests need 2 CUDA devices: run them with make gpu-test-2 there"
    return save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3", head_dim=64, hidden_size=256)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, target: Path, data: Path) -> RunConfig:
    """Target and trainer on the second GPU."""
    config = run_config(tmp_path_factory.mktemp("inline") / "run", target, data, **SETTINGS)
    assert run(config).status == "finished"
    assert len(losses(config)) > 10
    return config


@pytest.fixture(scope="module")
def server(commands: Commands, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server on the first GPU."""
    directory = tmp_path_factory.mktemp("server")
    options = (
        "--port",
        "0",
        "--device",
        "cuda:0",
        "--dtype",
        "bfloat16",
        "--ready-file",
        str(directory / "ready.json"),
    )
    served = ready(commands.start("serve", str(target), *options), directory)
    yield served
    served.kill()


@pytest.mark.parametrize("transport", ["nccl", "http", "file"])
@pytest.mark.parametrize("prefetch_rows", [1, 4])
def test_the_target_on_another_gpu_changes_nothing(
    inline: RunConfig, server: Served, target: Path, data: Path, tmp_path: Path, transport: str, prefetch_rows: int
) -> None:
    changes = {"transport__kind": transport, "transport__prefetch_rows": prefetch_rows}
    config = run_config(
        tmp_path / "run", target, data, **SETTINGS, placement__target="urls", placement__urls=[server.url], **changes
    )
    assert run(config).status == "finished"
    assert losses(config) == losses(inline)
    assert same_weights(config, inline)


def test_auto_takes_nccl_between_two_gpus_of_one_host(server: Served, target: Path, data: Path, tmp_path: Path) -> None:
    config = run_config(
        *(tmp_path / "run", target, data),
        **SETTINGS,
        training__max_steps=2,
        placement__target="urls",
        placement__urls=[server.url],
    )
    assert run(config).status == "finished"
    assert "travel by nccl" in (tmp_path / "run" / "logs" / "trainer-0.log").read_text()
