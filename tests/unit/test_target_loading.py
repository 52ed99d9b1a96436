"""Loading a target: what loads, and what a user is told about what does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.target.hf.loading import find_parts, load_model, load_tokenizer, resolve_checkpoint, resolve_device
from tiny import save_nested_tiny_target, save_tiny_target

CPU = torch.device("cpu")


def load(path: Path, **settings):
    return load_model(TargetConfig(model=str(path), **settings), resolve_checkpoint(str(path)), CPU)


@pytest.fixture
def copied_target(tiny_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target, tmp_path / "copy"))


def test_a_sharded_checkpoint_loads_the_same_weights_as_a_single_file(tiny_target: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, weight in load(tmp_path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_tied_target_shares_its_embedding_with_its_lm_head(tmp_path: Path):
    parts = find_parts(load(save_tiny_target(tmp_path, "llama", tie_word_embeddings=True)))
    assert parts.lm_head.weight is parts.embedding.weight


def test_a_text_model_nested_in_another_loads_without_the_rest(tmp_path: Path):
    model = load(save_nested_tiny_target(tmp_path))
    parts = find_parts(model)
    assert (len(parts.layers), parts.vocab_size) == (4, 300)
    assert not [name for name, _ in model.named_parameters() if "visual" in name]


def test_dtype_is_the_checkpoints_own_unless_set(tmp_path: Path):
    save_tiny_target(tmp_path, dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(tmp_path).bfloat16().save_pretrained(tmp_path)
    assert find_parts(load(tmp_path)).state_dtype is torch.bfloat16
    assert find_parts(load(tmp_path, dtype="float32")).state_dtype is torch.float32


def test_the_loaded_model_is_frozen(tiny_target: Path):
    model = load(tiny_target)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(TargetError, match="no such directory"):
        resolve_checkpoint(str(tmp_path / "absent"))


def test_a_file_instead_of_a_directory_is_refused(tiny_target: Path):
    with pytest.raises(TargetError, match="is a file"):
        resolve_checkpoint(str(tiny_target / "config.json"))


def test_a_directory_without_configuration_is_refused(copied_target: Path):
    (copied_target / "config.json").unlink()
    with pytest.raises(TargetError, match=r"no config\.json"):
        load(copied_target)


def test_an_unknown_architecture_is_refused_by_name(copied_target: Path):
    (copied_target / "config.json").write_text(json.dumps({"model_type": "velodrome"}))
    with pytest.raises(TargetError, match="velodrome"):
        load(copied_target)


def test_a_configuration_that_is_not_json_is_refused(copied_target: Path):
    (copied_target / "config.json").write_text("{")
    with pytest.raises(TargetError, match=r"config\.json"):
        load(copied_target)


def test_a_checkpoint_without_safetensors_says_how_to_convert(copied_target: Path):
    (copied_target / "model.safetensors").rename(copied_target / "pytorch_model.bin")
    with pytest.raises(TargetError, match="save_pretrained"):
        load(copied_target)


def test_a_missing_shard_is_named(copied_target: Path):
    AutoModelForCausalLM.from_pretrained(copied_target).save_pretrained(copied_target, max_shard_size="40KB")
    shard = sorted(copied_target.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(TargetError, match=shard.name):
        load(copied_target)


def test_a_file_cut_short_is_named(copied_target: Path):
    file = copied_target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TargetError, match=r"model\.safetensors is damaged"):
        load(copied_target)


def test_weights_that_lack_tensors_of_the_model_are_refused(copied_target: Path):
    file = copied_target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5, "layer_types": None}))
    with pytest.raises(TargetError, match=r"layers\.4"):
        load(copied_target)


def test_a_directory_without_tokenizer_is_refused(copied_target: Path):
    for file in copied_target.glob("token*"):
        file.unlink()
    with pytest.raises(TargetError, match="tokenizer"):
        load_tokenizer(str(copied_target))


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(name: str):
    with pytest.raises(TargetError, match=name):
        resolve_device(name)
