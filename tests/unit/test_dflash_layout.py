"""The published (z-lab) layout: written in full, read back equal, and refused where it does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from paceline.config.drafts import DFlashConfig
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.published import read_published
from paceline.errors import DraftError
from paceline.schema.target_info import RopeInfo
from rows import make_context, make_row, random_features, tiny_info

YARN = RopeInfo(theta=1e6, scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096})
INFO = tiny_info(rope=YARN, dtype="bfloat16", max_position_embeddings=16384)
CONFIG = DFlashConfig(num_layers=2, block_size=8, layer_types=("full_attention", "sliding_attention"), sliding_window=6)


def build(config: DFlashConfig = CONFIG, info=INFO, seed: int = 0) -> DFlash:
    algorithm = DFlash(config, make_context(info, seed=seed))
    if config.init_from is None:
        with torch.no_grad():  # at birth every draft proposes nearly the same
            for parameter in algorithm.draft.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8.0)
    return algorithm


def test_names_and_shapes_are_the_published_ones():
    layer = {
        "self_attn.q_proj.weight": [32, 32],
        "self_attn.k_proj.weight": [16, 32],
        "self_attn.v_proj.weight": [16, 32],
        "self_attn.o_proj.weight": [32, 32],
        "self_attn.q_norm.weight": [8],
        "self_attn.k_norm.weight": [8],
        "mlp.gate_proj.weight": [48, 32],
        "mlp.up_proj.weight": [48, 32],
        "mlp.down_proj.weight": [32, 48],
        "input_layernorm.weight": [32],
        "post_attention_layernorm.weight": [32],
    }
    expected = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"fc.weight": [32, 64], "hidden_norm.weight": [32], "norm.weight": [32]}
    tensors = build().published_tensors()
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors.values()} == {(torch.bfloat16, "cpu")}


def test_the_published_configuration_has_every_field_engines_read():
    written = json.loads(json.dumps(build().published_config()))
    assert written["architectures"] == ["DFlashDraftModel"]
    assert written["model_type"] == "qwen3"
    assert written["block_size"] == 8
    assert written["dflash_config"] == {"mask_token_id": 60, "target_layer_ids": [1, 5]}
    assert written["num_target_layers"] == 8
    assert written["layer_types"] == ["full_attention", "sliding_attention"]
    assert (written["sliding_window"], written["use_sliding_window"]) == (6, True)
    assert (written["hidden_size"], written["vocab_size"], written["head_dim"]) == (32, 64, 8)
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")
    assert written["max_position_embeddings"] == 16384
    assert written["rope_theta"] == 1e6
    assert written["rope_scaling"] == YARN.scaling
    assert written["rope_parameters"] == {**YARN.scaling, "rope_theta": 1e6}
    assert "is_causal" not in written
    assert "quantization_config" not in written


@pytest.mark.parametrize("rope", [YARN, RopeInfo(theta=5e5)])
def test_transformers_reads_the_same_rope_window_and_layer_types(rope):
    draft = build(info=tiny_info(rope=rope))
    written = draft.published_config()
    read = Qwen3Config(**written)
    assert read.rope_parameters["rope_theta"] == rope.theta
    assert read.rope_parameters["rope_type"] == (rope.scaling or {"rope_type": "default"})["rope_type"]
    assert read.sliding_window == 6
    assert read.layer_types == ["full_attention", "sliding_attention"]


def test_a_published_draft_read_back_proposes_the_same(tmp_path):
    info = tiny_info(rope=YARN)
    trained = build(info=info, seed=1)
    save_file(trained.published_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(trained.published_config()))
    other = build(info=info, seed=2)
    started = build(CONFIG.model_copy(update={"init_from": str(tmp_path)}), info=info, seed=3)
    row = random_features(make_row([30], [[(0, 30)]]), DFlash.feature_spec(CONFIG, info), info)
    starts = torch.arange(29)
    assert not torch.equal(other.propose(row, starts), trained.propose(row, starts))
    other.load_published(*read_published(tmp_path))
    for again in (other, started):
        assert torch.equal(again.propose(row, starts), trained.propose(row, starts))
        for name, tensor in trained.draft.state_dict().items():
            assert torch.equal(again.draft.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 16}, ["block_size: 16 published, 8 here"]),
        ({"dflash_config": {"mask_token_id": 61, "target_layer_ids": [1, 5]}}, ["mask_token_id: 61 published, 60"]),
        ({"dflash_config": {"mask_token_id": 60, "target_layer_ids": [2, 5]}}, ["[2, 5] published, [1, 5] here"]),
        ({"num_target_layers": 36}, ["num_target_layers: 36 published, 8 here"]),
        ({"layer_types": None}, ["layer_types", "'full_attention', 'sliding_attention'"]),
        ({"sliding_window": 7}, ["sliding_window: 7 published, 6 here"]),
        ({"is_causal": True}, ["causal: True published, False here"]),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0}}, ["rope_theta: 10000.0 published"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ({"vocab_size": 65}, ["vocab_size: 65 published, 64 here"]),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, ["LlamaForCausalLMEagle3"]),
    ],
)
def test_a_published_draft_of_another_convention_is_refused(change, words):
    draft = build()
    with pytest.raises(DraftError) as raised:
        draft.load_published(draft.published_config() | change, draft.published_tensors())
    for word in words:
        assert word in str(raised.value)


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name():
    draft = build()
    config, tensors = draft.published_config(), draft.published_tensors()
    without = {name: tensor for name, tensor in tensors.items() if name != "fc.weight"}
    with pytest.raises(DraftError, match=r"missing fc\.weight, unknown none"):
        draft.load_published(config, without)
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(DraftError, match=r"unknown _orig_mod\."):
        draft.load_published(config, wrapped)
    with pytest.raises(DraftError, match=r"norm\.weight is \[16\] in the published draft, \[32\] here"):
        draft.load_published(config, tensors | {"norm.weight": torch.ones(16)})


def test_a_folder_that_is_no_draft_is_refused_by_file(tmp_path):
    with pytest.raises(DraftError, match=r"cannot read .*config\.json"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DraftError, match=r"config\.json is not JSON"):
        read_published(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DraftError, match=r"no \*\.safetensors file"):
        read_published(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DraftError, match=r"cannot read .*model\.safetensors"):
        read_published(tmp_path)
