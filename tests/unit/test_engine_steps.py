"""How much of an engine's own work the self-test's long text covers."""

import pytest

from paceline.config.target import TargetConfig
from paceline.launch.selftest import _far_captures
from paceline.target.engines.steps import step_tokens
from paceline.target.selftest.texts import num_far_captures
from paceline.target.sglang.kind import SGLANG
from paceline.target.vllm.kind import VLLM


def config(engine: str = "vllm", **changes: object) -> TargetConfig:
    return TargetConfig.model_validate({"model": "m", "engine": engine, **changes})


@pytest.mark.parametrize(
    ("arguments", "on_gpu", "expected"),
    [
        ({}, True, 16_384),
        ({}, False, 2048),
        ({"max-num-batched-tokens": 512}, True, 16_384),  # it may be more: of prompts alone, or of each process
        ({"max_num_batched_tokens": "32768"}, True, 32_768),
        ({"max-num-batched-tokens": "32k"}, True, 32_000),
        ({"max-num-batched-tokens": "32K"}, True, 32_768),
        ({"max-num-batched-tokens": "many"}, True, 16_384),
        ({"tensor-parallel-size": 2, "-pp": "2"}, False, 8192),
        ({"data-parallel-size": 4, "tensor-parallel-size": 2}, True, 4 * 16_384),  # dealt to four of them
        ({"-dp": 2, "max-num-batched-tokens": 20_000}, True, 40_000),
        ({"data-parallel-size": 2, "tensor-parallel-size": 2}, False, 8192),
    ],
)
def test_the_steps_of_a_vllm(arguments: dict[str, object], on_gpu: bool, expected: int) -> None:
    assert step_tokens(VLLM, config(engine_args=arguments), on_gpu) == expected


def test_the_steps_of_an_sglang_and_of_two_processes() -> None:
    assert step_tokens(SGLANG, config("sglang", engine_args={"chunked-prefill-size": 20_000}), True) == 20_000
    assert step_tokens(SGLANG, config("sglang", engine_args={"chunked-prefill-size": -1}), True) == 16_384
    wide = {"chunked-prefill-size": -1, "max-prefill-tokens": 65_536}
    assert step_tokens(SGLANG, config("sglang", engine_args=wide), True) == 65_536
    assert step_tokens(SGLANG, config("sglang", engine_args={"dp-size": 2}), True) == 2 * 16_384
    assert step_tokens(VLLM, config(tensor_parallel=2), False) == 4096


@pytest.mark.parametrize(
    ("step", "num", "is_more"), [(2048, 1, True), (4096, 2, True), (16_384, 8, True), (18_432, 9, True)]
)
def test_far_texts_are_more_than_a_step(step: int, num: int, is_more: bool) -> None:
    assert num_far_captures(step) == (num, is_more)
    assert num * 2304 > step


def test_steps_that_no_texts_fill_are_said_to_be_unproven() -> None:
    assert num_far_captures(73_728) == (32, False)
    assert _far_captures(config(device="cpu", engine_args={"max-num-batched-tokens": 2048})) == (1, None)
    num, unproven = _far_captures(config(device="cpu", engine_args={"max-num-batched-tokens": 100_000}))
    assert (num, unproven) == (32, "not compared, for want of tokens: steps of 100,000 tokens, and their chunks")


def test_of_an_engine_of_somebody_else_steps_are_not_known_unless_they_are_told() -> None:
    reached = {"engine_url": "http://127.0.0.1:1", "engine_directory": "/dev/shm", "device": "cpu"}
    num, unproven = _far_captures(config(**reached))
    assert num == 1
    assert "not known: whether the engine's steps are of more than 2,048 tokens" in str(unproven)
    assert _far_captures(config(**reached, engine_args={"max-num-batched-tokens": 4096})) == (2, None)
