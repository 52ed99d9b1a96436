"""One run on two GPUs: NCCL, FSDP2 with whole weights and with shards, the losses of one GPU, exact resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forking import Commands
from paceline.config.run import RunConfig
from ranks import run_ranks
from tiny import save_tiny_target
from whole_run import losses, run_config, same_weights

pytestmark = [pytest.mark.gpu2, pytest.mark.filterwarnings("ignore::UserWarning")]
SETTINGS = {
    "target__device": "cuda",
    "training__device": "cuda",
    "training__rows_per_step": 3,
    "training__deterministic": True,
    "training__eval_every": 4,
    "data__row_tokens": 256,
}
BF16 = {"target__dtype": "bfloat16", "training__dtype": "bfloat16"}

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory, data: Path) -> MakeConfig:
    assert torch.cuda.device_count() >= 2, "these tests need 2 CUDA devices: run them with make gpu-test-2 there"
    target = save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3", head_dim=64, hidden_size=256)

    def make(**changes: Any) -> RunConfig:
        return run_config(tmp_path_factory.mktemp("run") / "run", target, data, **{**SETTINGS, **changes})

    return make


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_losses_of_two_gpus_are_those_of_one(commands: Commands, make_config: MakeConfig, sharding: str) -> None:
    alone, together = make_config(), make_config(training__sharding=sharding)
    run_ranks(commands, alone, 1)
    run_ranks(commands, together, 2)
    assert len(losses(alone)) > 5
    for ours, theirs in zip(losses(together), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_gpus_stopped_in_the_middle_go_on_bit_by_bit(
    commands: Commands, make_config: MakeConfig, sharding: str
) -> None:
    whole, halves = (make_config(training__sharding=sharding, **BF16) for _ in range(2))
    run_ranks(commands, whole, 2)
    run_ranks(commands, halves, 2, stop_after_looks=4)
    assert 0 < len(losses(halves)) < len(losses(whole))
    run_ranks(commands, halves, 2)
    assert losses(halves) == losses(whole)
    assert same_weights(halves, whole)


def test_compiled_drafts_train_on_two_gpus(commands: Commands, make_config: MakeConfig) -> None:
    eager, compiled = (make_config(training__compile=compiled, training__deterministic=False) for compiled in (0, 1))
    run_ranks(commands, eager, 2)
    run_ranks(commands, compiled, 2)
    for ours, theirs in zip(losses(compiled), losses(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
