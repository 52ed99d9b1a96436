"""A real vLLM over two processes (tensor parallel): one of them writes hidden states, and they are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.test_vllm_engine import ARGS, EVERYTHING, PYTHON, check_equal, hf_config, target_config
from paceline.config.target import TargetConfig
from paceline.launch.selftest import prepare_selftest
from paceline.target.hf.engine import HFEngine
from paceline.target.opening import ServedEngine, open_engine
from tiny import save_tiny_target, tiny_request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    assert PYTHON.exists(), "make engine-test installs vLLM"
    target = save_tiny_target(tmp_path_factory.mktemp("target") / request.param, request.param, head_dim=32)
    return target_config(target, engine_args=ARGS | {"tensor-parallel-size": 2})


@pytest.fixture(scope="module")
def engine(config: TargetConfig) -> Iterator[ServedEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with open_engine(config) as engine:
            yield engine


def test_two_ranks_pass_the_self_test(config: TargetConfig, engine: ServedEngine):
    result = prepare_selftest(config).run(config, engine)
    assert (result.problem, result.unproven) == (None, None)


def test_rows_of_two_ranks_equal_those_of_the_hf_engine(config: TargetConfig, engine: ServedEngine):
    rows = [tiny_request((300, 1, 77, 20), seed=1), tiny_request((5, 600), seed=2)]
    futures = [engine.capture(row, EVERYTHING) for row in rows]
    with contextlib.closing(HFEngine(hf_config(Path(config.model)))) as hf:
        for row, future in zip(rows, futures, strict=True):
            check_equal(future.result(120), hf.capture(row, EVERYTHING).result(60))
