"""TargetInfo: facts read from configuration and tokenizer, and proved on the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.target_info import LogitTransform, RopeInfo, TargetInfo
from paceline.target.hf.info import build_target_info, dense_mlp_width, read_heads, read_logit_transform, read_rope
from paceline.target.hf.loading import find_parts, load_model, load_tokenizer
from paceline.target.hf.selftest import check_logits, measure_embedding_scale
from tiny import save_tiny_target, tiny_config, tiny_tokenizer


def build(path: Path, **settings) -> TargetInfo:
    config = TargetConfig(model=str(path), **settings)
    parts = find_parts(load_model(config, path, torch.device("cpu")))
    return build_target_info(config, path, parts, load_tokenizer(str(path)))


def build_parts(architecture: str, dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    return find_parts(AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)).to(dtype).eval())


def test_sizes_are_those_of_the_configuration(tiny_target: Path):
    info = build(tiny_target)
    assert (info.num_layers, info.hidden_size, info.intermediate_size) == (4, 32, 64)
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == (4, 2, 8)
    assert (info.vocab_size, info.num_tokenizer_tokens, info.model_type) == (300, 261, "qwen3")
    assert (info.dtype, info.tied_embeddings, info.embedding_scale) == ("float32", False, 1.0)


def test_a_mixture_of_experts_has_no_dense_mlp(tmp_path: Path):
    assert build(save_tiny_target(tmp_path, "qwen3_moe")).intermediate_size is None


def test_layer_types_and_window_are_the_targets_own(tmp_path: Path):
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    changes = {"layer_types": types, "use_sliding_window": True, "sliding_window": 5}
    info = build(save_tiny_target(tmp_path, "qwen3", **changes))
    assert (info.layer_types, info.sliding_window) == (tuple(types), 5)


def test_a_window_that_no_layer_uses_is_not_reported(tmp_path: Path):
    info = build(save_tiny_target(tmp_path, "gemma2", layer_types=["full_attention"] * 4))
    assert info.sliding_window is None


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "linear"])
def test_known_rope_scaling_is_kept(rope_type: str):
    scaling: dict[str, Any] = {"rope_type": rope_type, "factor": 4.0}
    if rope_type != "linear":
        scaling["original_max_position_embeddings"] = 1024
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = read_rope(tiny_config("llama", rope_parameters=scaling | {"rope_theta": 5e5}))
    assert rope == RopeInfo(theta=5e5, scaling=scaling)


def test_fields_that_engines_read_in_different_ways_are_left_out_of_the_scaling():
    """mscale takes the scale off attention in transformers and not in vLLM, truncate is unknown to SGLang."""
    kept = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "original_max_position_embeddings": 128}
    odd = {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0, "truncate": False}
    config = tiny_config("llama")
    config.rope_parameters = kept | odd | {"rope_theta": 1e4}
    assert read_rope(config) == RopeInfo(theta=1e4, scaling=kept)


def test_a_yarn_without_a_factor_is_not_kept():
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    assert read_rope(config).scaling is None


def test_longrope_leaves_theta_alone():
    assert read_rope(tiny_config("phi3")) == RopeInfo(theta=10000.0)


def test_of_two_ropes_a_draft_takes_that_of_full_attention():
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert read_rope(tiny_config("gemma3")) == RopeInfo(theta=1e6, scaling=scaling)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("qwen2", {}, (4, 2, 8)),
        ("mistral", {"hidden_size": 48}, (4, 2, 12)),
        ("llama", {"head_dim": 16}, (4, 2, 16)),
        # Latent attention: neither the 4 rotated numbers of a key nor a key/value head for each head.
        ("deepseek_v3", {"v_head_dim": 16}, (4, 4, 16)),
        ("deepseek_v3", {"num_attention_heads": 24, "num_key_value_heads": 24}, (24, 8, 8)),
        ("deepseek_v3", {"num_attention_heads": 20, "num_key_value_heads": 20}, (20, 4, 8)),
    ],
)
def test_heads_are_those_a_draft_may_copy(architecture: str, changes: dict[str, int], expected: tuple[int, int, int]):
    assert read_heads(tiny_config(architecture, **changes)) == expected


@pytest.mark.parametrize(
    ("architecture", "changes", "width"),
    [
        ("llama", {}, 64),
        ("qwen3_moe", {}, None),
        ("gpt_oss", {}, None),
        ("deepseek_v3", {}, 64),
        ("glm4_moe", {"first_k_dense_replace": 0}, None),
        ("llama4_text", {"intermediate_size_mlp": 80}, 80),
        ("llama4_text", {"interleave_moe_layer_step": 1}, None),
    ],
)
def test_the_mlp_width_is_that_of_layers_without_experts(architecture: str, changes: dict[str, int], width: int | None):
    assert dense_mlp_width(tiny_config(architecture, **changes)) == width


def test_what_a_draft_may_not_copy_is_left_out_of_the_scaling():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    never = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = tiny_config("llama")
    config.rope_parameters = scaling | never | {"rope_theta": 5e5}
    assert read_rope(config) == RopeInfo(theta=5e5, scaling=scaling)


def test_other_rope_types_leave_theta_alone():
    parameters = {"rope_type": "dynamic", "rope_theta": 7e4, "factor": 2.0}
    assert read_rope(tiny_config("llama", rope_parameters=parameters)) == RopeInfo(theta=7e4, scaling=None)


def test_three_position_axes_are_declared_for_mrope(tmp_path: Path):
    assert build(save_tiny_target(tmp_path, "qwen3_5")).num_position_axes == 3


def test_end_tokens_come_from_both_configurations(tmp_path: Path):
    save_tiny_target(tmp_path)
    GenerationConfig(eos_token_id=[258, 256]).save_pretrained(tmp_path)
    assert build(tmp_path).eos_token_ids == (256, 258)


def test_the_mask_token_is_the_tokenizers_own_or_the_first_row_no_token_uses(tmp_path: Path):
    save_tiny_target(tmp_path)
    assert build(tmp_path).mask_token_id == 261
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|tool|>"})
    tokenizer.save_pretrained(tmp_path)
    assert build(tmp_path).mask_token_id == tokenizer.convert_tokens_to_ids("<|tool|>") < 261


def test_no_mask_token_is_invented_when_every_row_is_used(tmp_path: Path):
    assert build(save_tiny_target(tmp_path, vocab_size=261)).mask_token_id is None


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path):
    save_tiny_target(tmp_path, vocab_size=260, eos_token_id=None)
    with pytest.raises(TargetError, match=r"up to 260.*260 rows"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "transform"),
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(soft_cap=3.0)),
        ("cohere", LogitTransform(scale=0.25)),
        ("granite", LogitTransform(scale=0.25)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_announced_logit_transforms_pass_the_check(architecture: str, transform: LogitTransform, dtype: torch.dtype):
    parts = build_parts(architecture, dtype)
    assert read_logit_transform(parts.config) == transform
    check_logits(parts, transform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_nobody_announced_is_refused_even_where_logits_are_small(dtype: torch.dtype):
    parts = build_parts("gemma2", dtype, final_logit_softcapping=30.0)
    logits = parts.model(torch.arange(8)[None]).logits
    assert logits.abs().max() < 1.0  # far below the cap: as it stands it changes next to nothing
    with pytest.raises(TargetError, match="rebuilt from the final hidden state") as failure:
        check_logits(parts, LogitTransform())
    assert "29." in str(failure.value) or "30" in str(failure.value)


def test_an_unknown_scale_is_refused():
    with pytest.raises(TargetError, match="does not know"):
        check_logits(build_parts("cohere"), LogitTransform())


@pytest.mark.parametrize(
    ("architecture", "scale"), [("qwen3", 1.0), ("gemma2", 32**0.5), ("granite", 6.0), ("qwen3_5", 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_scale_is_measured(architecture: str, scale: float, dtype: torch.dtype):
    assert measure_embedding_scale(build_parts(architecture, dtype)) == scale
