"""Tensor parallelism without a second process: what is refused before any is started, rows as they are handed on."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.schema.features import FeatureSpec
from paceline.target.hf.handed_rows import encode_end, encode_row, read_row
from paceline.target.hf.parallel import check_parallel
from tiny import tiny_config, tiny_request

CPU = torch.device("cpu")


def check(path: Path, size: int, device: torch.device = CPU) -> None:
    check_parallel(TargetConfig(model=str(path), tensor_parallel=size), path, device)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "= 3 does not divide the 4 num_attention_heads"),
        ({}, 4, "= 4 does not divide the 2 num_key_value_heads"),
        ({"vocab_size": 301}, 2, "= 2 does not divide the 301 vocab_size"),
        ({"intermediate_size": 63}, 2, "= 2 does not divide the 63 intermediate_size"),
    ],
)
def test_sizes_that_cannot_be_shared_out_are_refused_with_both_numbers(
    tmp_path: Path, changes: dict[str, int], size: int, message: str
):
    tiny_config("qwen3", **changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, size)


def test_sizes_that_can_be_shared_out_are_accepted(tmp_path: Path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    check(tmp_path, 2)


def test_an_architecture_without_a_plan_is_refused(tmp_path: Path):
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no tensor-parallel plan for gpt2: use target\.tensor_parallel = 1"):
        check(tmp_path, 2)


def test_more_processes_than_gpus_are_refused(tmp_path: Path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=rf"cuda:{count} to cuda:{count + 1}, this machine has {count}"):
        check(tmp_path, 2, torch.device("cuda", count))


def test_a_model_is_spread_in_one_way_only():
    with pytest.raises(ValidationError, match='tensor_parallel = 2 and device_map = "auto"'):
        TargetConfig(model="m", tensor_parallel=2, device_map="auto")


@pytest.mark.parametrize("spec", [FeatureSpec((0,), greedy=True), FeatureSpec((), final_hidden="all", logsumexp=True)])
def test_a_handed_row_asks_for_the_same_collectives_and_keeps_nothing(spec: FeatureSpec):
    request = tiny_request((3, 1, 5), seed=2, num_position_axes=3)
    pipe = io.BytesIO(encode_row(7, request, spec) + encode_end())
    row = read_row(pipe)
    assert row is not None
    assert row.number == 7
    assert row.spec() == FeatureSpec((), final_hidden="none", greedy=spec.greedy, logsumexp=spec.logsumexp)
    again = row.request(num_position_axes=3)
    for name in ("tokens", "documents", "positions"):
        assert np.array_equal(getattr(again, name), getattr(request, name)), name
    assert read_row(pipe) is None


@pytest.mark.parametrize("num_bytes", [0, 5, 30])
def test_a_pipe_that_ends_in_the_middle_of_a_row_is_the_end_of_rank_0(num_bytes: int):
    frame = encode_row(0, tiny_request((3,)), FeatureSpec((0,)))
    with pytest.raises(EOFError):
        read_row(io.BytesIO(frame[:num_bytes]))
