"""Tensor parallelism on two GPUs: NCCL, bf16, and an end in bounded time."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import EngineLostError, StoppedError
from paceline.launch.reference_place import free_on_gpus
from paceline.launch.selftest import prepare_selftest
from paceline.schema.features import Features, FeatureSpec
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.stored_tensors import read_tensor_table
from tiny import save_tiny_target, tiny_request

pytestmark = pytest.mark.gpu2

MID_SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SPEC = FeatureSpec(layers=(0, 1, 3), final_hidden="all", greedy=True, logsumexp=True)
LENGTHS = (300, 1, 77, 646)


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> None:
    count = torch.cuda.device_count()
    assert count >= 2, f"these tests need 2 CUDA devices, this machine has {count}: run them with make gpu-test-2 there"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_target(tmp_path_factory.mktemp("target"), **MID_SIZE)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():  # tiny targets are scaled up to be opinionated; this size is so without
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    model.save_pretrained(path)
    return path


def start(target: Path, size: int = 2, dtype: str = "bfloat16", **settings) -> HFEngine:
    config = {"device": "cuda:0", "tensor_parallel": size, "dtype": dtype}
    return HFEngine(TargetConfig.model_validate({"model": str(target), **config, **settings}))


def compute(target: Path, request, **settings) -> Features:
    engine = start(target, **settings)
    features = engine.capture(request, SPEC).result(300)
    engine.close()
    return features


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_follower_fails_every_row_in_bounded_time(target: Path):
    """NCCL notices nothing: the rows must fail, and the process must be able to go on, all the same."""
    engine = start(target)
    lost = []
    engine.on_lost(lost.append)
    futures = [engine.capture(tiny_request((4000,) * 16, seed=seed), SPEC) for seed in range(40)]
    assert futures[0].result(120).finite
    os.kill(engine.follower_pids[0], signal.SIGKILL)
    failures = [error for future in futures if (error := future.exception(20)) is not None]
    assert failures, "the premise: rows were left when the follower died"
    assert all(isinstance(error, EngineLostError) and "SIGKILL" in str(error) for error in failures)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 20.0
    assert len(lost) == 1


def test_fp32_features_equal_those_of_one_gpu(target: Path):
    request = tiny_request(LENGTHS)
    one = compute(target, request, size=1, dtype="float32")
    two = compute(target, request, dtype="float32")
    assert relative(two.hidden, one.hidden) < 1e-5
    assert relative(two.final_hidden, one.final_hidden) < 1e-5
    assert (two.logsumexp - one.logsumexp).abs().max() < 1e-3
    assert (two.greedy == one.greedy).float().mean() > 0.999


def test_compiled_layers_give_the_same_features(target: Path):
    request = tiny_request(LENGTHS)
    plain, compiled = compute(target, request), compute(target, request, compile=True)
    assert relative(compiled.hidden, plain.hidden) < 3e-2


def test_a_reference_that_one_gpu_cannot_hold_is_computed_on_two_before_the_engine_is_there(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    config = TargetConfig(model=str(target), device="cuda:0", tensor_parallel=2, dtype="bfloat16")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert all(num_bytes > 1e9 for num_bytes in free_on_gpus(range(2)).values())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one = prepare_selftest(config)
    weight_bytes = 4 * sum(math.prod(tensor.shape) for tensor in read_tensor_table(target).values())
    monkeypatch.setattr("paceline.launch.selftest.bytes_of_text", lambda *_: 0)
    monkeypatch.setattr(
        "paceline.launch.reference_place.free_on_gpus",
        lambda gpus: {0: int(0.9 * weight_bytes), 1: int(0.45 * weight_bytes)},
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    with caplog.at_level(logging.INFO, logger="paceline"):
        two = prepare_selftest(config)
    assert "in float32 on 2 GPUs" in caplog.text
    for name in ("layers", "final_hidden", "top_logits"):
        assert relative(getattr(two.reference, name), getattr(one.reference, name)) < 1e-5
    monkeypatch.undo()
    engine = HFEngine(config)
    result = two.run(config, engine)
    engine.close()
    print("\n".join(result.describe()))
    assert result.problem is None


@pytest.fixture(scope="module")
def pair(target: Path) -> Iterator[HFEngine]:
    """One such engine fits into a process: what starts its own comes before, in this file."""
    engine = start(target)
    yield engine
    engine.close()


def test_bf16_features_are_close_to_fp32(pair: HFEngine, target: Path):
    request = tiny_request(LENGTHS)
    exact = compute(target, request, size=1, dtype="float32")
    ours = pair.capture(request, SPEC).result(60)
    assert ours.hidden.device == torch.device("cuda", 0)
    assert ours.hidden.dtype is torch.bfloat16
    for slot in range(3):
        assert relative(ours.hidden[:, slot], exact.hidden[:, slot]) < 3e-2


def test_rows_submitted_without_waiting_are_bit_equal_to_rows_alone(pair: HFEngine):
    requests = [tiny_request((50 + seed, 200, 7), seed=seed) for seed in range(20)]
    alone = [pair.capture(request, SPEC).result(60) for request in requests]
    together = [future.result(60) for future in [pair.capture(request, SPEC) for request in requests]]
    for one, other in zip(alone, together, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_each_rank_holds_its_share_of_the_weights(pair: HFEngine, target: Path):
    whole = sum(math.prod(tensor.shape) for tensor in read_tensor_table(target).values())
    parameters = pair._loaded.parts.model.parameters()
    share = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    assert share < 0.51 * whole


def test_close_is_quick_and_leaves_no_process(pair: HFEngine):
    follower = pair.follower_pids[0]
    futures = [pair.capture(tiny_request((4000,) * 16, seed=seed), SPEC) for seed in range(50)]
    began = time.monotonic()
    pair.close()
    assert time.monotonic() - began < 10.0
    assert not is_running(follower)
    failures = [error for future in futures if (error := future.exception(0)) is not None]
    assert failures
    assert all(isinstance(error, StoppedError) for error in failures)
