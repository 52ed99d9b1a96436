"""Embedding and lm_head rows read from checkpoint files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.target.hf.weights import CheckpointWeights
from tiny import save_nested_tiny_target, save_tiny_target

CPU = torch.device("cpu")


def read(path: Path, dtype: torch.dtype = torch.float32, **settings) -> CheckpointWeights:
    return CheckpointWeights(TargetConfig(model=str(path), **settings), CPU, dtype)


def rename_tensors(path: Path, names: dict[str, str]) -> None:
    tensors = load_file(path / "model.safetensors")
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_tables_are_those_of_the_model(tiny_target: Path, tmp_path: Path, max_shard_size: str):
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    weights = read(tmp_path)
    assert torch.equal(weights.embedding(), model.model.embed_tokens.weight)
    assert torch.equal(weights.lm_head(), model.lm_head.weight)
    assert weights.lm_head_bias() is None


def test_rows_come_in_the_order_asked_for(tiny_target: Path):
    weights = read(tiny_target)
    rows = torch.tensor([299, 0, 7, 7])
    assert torch.equal(weights.lm_head(rows), weights.lm_head()[rows])


def test_repeated_calls_share_storage(tiny_target: Path):
    weights = read(tiny_target)
    rows = torch.arange(5)
    assert weights.embedding().data_ptr() == weights.embedding().data_ptr()
    assert weights.lm_head(rows).data_ptr() == weights.lm_head(rows.clone()).data_ptr()
    assert weights.lm_head(rows + 1).data_ptr() != weights.lm_head(rows).data_ptr()


def test_a_tied_lm_head_is_the_embeddings_storage(tmp_path: Path):
    save_tiny_target(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    weights = read(tmp_path)
    assert weights.lm_head().data_ptr() == weights.embedding().data_ptr()


@pytest.mark.parametrize(
    ("kind", "embedding", "lm_head"),
    [
        ("qwen3_5", "model.language_model.embed_tokens.weight", "lm_head.weight"),
        ("gemma3", "language_model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("llama4", "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("mistral3", "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_a_nested_text_model_is_found(tmp_path: Path, kind: str, embedding: str, lm_head: str):
    save_nested_tiny_target(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = read(tmp_path)
    assert torch.equal(weights.embedding(), tensors[embedding])
    assert torch.equal(weights.lm_head(), tensors[lm_head])


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_copies_in_layers_that_predict_further_tokens_are_passed_over(tmp_path: Path, architecture: str):
    save_tiny_target(tmp_path, architecture)
    tensors = load_file(tmp_path / "model.safetensors")
    copies = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")
    save_file(tensors | {name: torch.zeros(300, 32) for name in copies}, tmp_path / "model.safetensors")
    weights = read(tmp_path)
    assert torch.equal(weights.embedding(), tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head(), tensors["lm_head.weight"])


def test_a_bias_of_the_lm_head_is_found(tmp_path: Path):
    save_tiny_target(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.bias"] = torch.arange(300.0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    bias = read(tmp_path).lm_head_bias(torch.tensor([3, 2]))
    assert bias is not None
    assert bias.tolist() == [3.0, 2.0]


def test_dtype_is_converted(tiny_target: Path):
    assert read(tiny_target, torch.bfloat16).embedding().dtype is torch.bfloat16


def test_odd_names_are_refused_with_candidates_and_can_be_given(tmp_path: Path):
    save_tiny_target(tmp_path)
    rename_tensors(tmp_path, {"model.embed_tokens.weight": "wheels.weight", "lm_head.weight": "finish.weight"})
    with pytest.raises(TargetError, match=r"wheels\.weight.*target\.embedding_key"):
        read(tmp_path)
    with pytest.raises(TargetError, match=r"finish\.weight.*target\.lm_head_key"):
        read(tmp_path, embedding_key="wheels.weight")
    weights = read(tmp_path, embedding_key="wheels.weight", lm_head_key="finish.weight")
    assert weights.embedding().shape == weights.lm_head().shape == (300, 32)


def test_a_key_that_is_not_there_is_refused_with_candidates(tiny_target: Path):
    with pytest.raises(TargetError, match=r"saddle.*model\.embed_tokens\.weight"):
        read(tiny_target, embedding_key="saddle")


def test_rows_outside_the_vocabulary_are_refused(tiny_target: Path):
    with pytest.raises(TargetError, match=r"0\.\.300 .* it has 300"):
        read(tiny_target).lm_head(torch.tensor([0, 300]))


def test_a_quantised_table_is_refused(tmp_path: Path):
    save_tiny_target(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match="F8_E4M3"):
        read(tmp_path).lm_head()
