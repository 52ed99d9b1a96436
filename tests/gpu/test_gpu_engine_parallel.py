"""vLLM and SGLang themselves over two GPUs; which Pythons have them: see test_gpu_engines.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.test_gpu_engines import LIMIT, NAMED, PYTHONS, SPEC, check_near, config_of, target  # noqa: F401 - a fixture
from paceline.config.target import TargetConfig
from paceline.launch.selftest import prepare_selftest
from paceline.schema.features import Features
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import ServedEngine, open_engine
from tiny import save_tiny_target, tiny_request

pytestmark = [pytest.mark.gpu2, pytest.mark.timeout(400)]
CASES = ("tensor parallel", "experts, tensor parallel", "experts, expert parallel")
EXPERT_PARALLEL: dict[str, dict[str, Any]] = {"vllm": {"enable-expert-parallel": True}, "sglang": {"ep-size": 2}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = {"head_dim": 64, "num_hidden_layers": 8, "dtype": "bfloat16"}
    routed = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    return save_tiny_target(tmp_path_factory.mktemp("target") / "qwen3_moe", "qwen3_moe", **shapes, **more, **routed)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=NAMED)
def config(request: pytest.FixtureRequest, case: str, target: Path, experts: Path) -> TargetConfig:  # noqa: F811
    count = torch.cuda.device_count()
    assert count >= 2, f"these tests need 2 CUDA devices, this machine has {count}: run them with make gpu-test-2 there"
    name = request.param
    assert name in PYTHONS, "set PACELINE_TEST_VLLM or PACELINE_TEST_SGLANG to the Python that has it"
    config = config_of(name, experts if "experts" in case else target, tensor_parallel=2)
    more = EXPERT_PARALLEL[name] if "expert parallel" in case else {}
    return config.model_copy(update={"engine_args": config.engine_args | more})


@pytest.fixture(scope="module")
def engine(config: TargetConfig) -> Iterator[ServedEngine]:
    with open_engine(config) as engine:
        yield engine


def check_most_are_near(features: Features, expected: Features) -> None:
    """Of routed tokens rounding sends some to other experts, and the rest of the text sees them."""
    received, exact = features.hidden[:, 0].float(), expected.hidden[:, 0].float()
    errors = (received - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert features.finite
    assert errors.median() < LIMIT
    assert (features.greedy == expected.greedy).float().mean() > 0.8


def test_two_gpus_pass_the_self_test(config: TargetConfig, engine: ServedEngine):
    result = prepare_selftest(config).run(config, engine)
    print("\n".join(result.describe()))
    assert (result.problem, result.unproven) == (None, None)


def test_rows_of_two_gpus_are_those_of_the_hf_engine(case: str, config: TargetConfig, engine: ServedEngine):
    check = check_most_are_near if "experts" in case else check_near
    rows = [tiny_request((300, 1, 77 + seed, 646, 1500), seed=seed) for seed in range(8)]
    alone = TargetConfig(model=config.model, dtype="float32", device="cuda:0")
    with contextlib.closing(HFEngine(alone)) as hf:
        futures = [engine.capture(row, SPEC) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            check(future.result(120), hf.capture(row, SPEC).result(60))
