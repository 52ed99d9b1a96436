"""Fingerprints tell targets apart, and only targets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paceline.errors import TargetError
from paceline.target.hf.fingerprint import SAMPLE_BYTES, fingerprint_tokenizer, fingerprint_weights
from paceline.target.hf.loading import load_tokenizer
from tiny import tiny_tokenizer


@pytest.fixture
def copied_target(tiny_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target, tmp_path / "copy"))


def test_a_copy_has_the_same_fingerprint(tiny_target: Path, copied_target: Path):
    assert fingerprint_weights(copied_target) == fingerprint_weights(tiny_target)


def test_resharding_keeps_the_fingerprint(tiny_target: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(tiny_target).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert fingerprint_weights(tmp_path) == fingerprint_weights(tiny_target)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_other_tensor_changes_the_fingerprint(tiny_target: Path, copied_target: Path, name: str):
    file = copied_target / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file)
    assert fingerprint_weights(copied_target) != fingerprint_weights(tiny_target)


def test_the_dtype_of_one_tensor_changes_the_fingerprint(tiny_target: Path, copied_target: Path):
    file = copied_target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, file)
    assert fingerprint_weights(copied_target) != fingerprint_weights(tiny_target)


def test_the_configuration_changes_the_fingerprint(tiny_target: Path, copied_target: Path):
    file = copied_target / "config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"transformers_version": "0.0", "_name_or_path": "elsewhere"}))
    assert fingerprint_weights(copied_target) == fingerprint_weights(tiny_target)
    file.write_text(json.dumps(facts | {"rms_norm_eps": 1e-3}))
    assert fingerprint_weights(copied_target) != fingerprint_weights(tiny_target)


def test_no_more_than_a_sample_of_each_tensor_is_read(tiny_target: Path, copied_target: Path):
    """The premise of reading 100 GB in seconds: most changes of a single number of a large tensor are not seen."""
    file = copied_target / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    assert tensors[name].nbytes > 10 * SAMPLE_BYTES
    seen = 0
    for row in range(0, 300, 20):
        changed = dict(tensors)
        changed[name] = tensors[name].clone()
        changed[name][row, 0] += 1.0
        save_file(changed, file)
        seen += fingerprint_weights(copied_target) != fingerprint_weights(tiny_target)
    assert seen <= 2


def test_a_missing_configuration_is_named(tmp_path: Path):
    with pytest.raises(TargetError, match=r"config\.json"):
        fingerprint_weights(tmp_path)


def test_a_saved_tokenizer_keeps_its_fingerprint(tiny_target: Path):

    assert fingerprint_tokenizer(load_tokenizer(str(tiny_target))) == fingerprint_tokenizer(tiny_tokenizer())


def test_one_more_token_changes_the_tokenizer_fingerprint():
    other = tiny_tokenizer()
    other.add_tokens(["peloton"])
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tiny_tokenizer())
