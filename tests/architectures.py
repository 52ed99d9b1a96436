"""The architectures of tiny targets: what each configuration has beside the sizes they share."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

ABSENT = object()
"""A shared size that an architecture's configuration does not have."""

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
"""The first layer dense, experts and one shared expert in the others."""

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"head_dim": ABSENT}),
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    # Hybrid: three layers of linear attention, then one of full attention.
    "qwen3_5": (
        Qwen3_5TextConfig,
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
    "mistral": (MistralConfig, {"head_dim": ABSENT, "sliding_window": 6}),
    # Caps small enough to bend the logits of tiny random weights.
    "gemma2": (
        Gemma2Config,
        {
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 0.5,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
        },
    ),
    # Layers of two kinds, each with a RoPE of its own.
    "gemma3": (
        Gemma3TextConfig,
        {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 8,
            "sliding_window": 6,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    # Full attention without positions.
    "cohere2": (
        Cohere2Config,
        {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 6, "layer_types": _ALTERNATING},
    ),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 6.0}),
    # Half of each head is turned, by other frequencies in texts of more than 32 tokens.
    "phi3": (
        Phi3Config,
        {
            "head_dim": ABSENT,
            "pad_token_id": None,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 7.0],
            },
        },
    ),
    # Each head has a sink that takes part in its softmax.
    "gpt_oss": (
        GptOssConfig,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    # Latent attention: keys of 8 + 4, values of 8 a head.
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **_ROUTED,
            "head_dim": ABSENT,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        {
            **_ROUTED,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
    # Chunks of 16 tokens; every other layer sees all and has no positions, but queries that grow with the distance.
    "llama4_text": (
        Llama4TextConfig,
        {
            "intermediate_size": 32,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 16,
            "floor_scale": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_LLAMA4_VISION = {
    "intermediate_size": 64,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_QWEN_TOKENS = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
_IMAGE_TOKENS = {"image_token_id": 290, "boi_token_index": 291, "eoi_token_index": 292}

NESTED: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig], str, dict[str, Any]]] = {
    "qwen3_5": (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config,
        "qwen3_5",
        {"vision_config": _QWEN_VISION, **_QWEN_TOKENS},
    ),
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config,
        "gemma3",
        {"vision_config": _VISION, "mm_tokens_per_image": 4, **_IMAGE_TOKENS},
    ),
    "llama4": (
        Llama4ForConditionalGeneration,
        Llama4Config,
        "llama4_text",
        {"vision_config": _VISION | _LLAMA4_VISION, **_IMAGE_TOKENS},
    ),
    "mistral3": (
        Mistral3ForConditionalGeneration,
        Mistral3Config,
        "mistral",
        {
            "vision_config": _VISION | {"model_type": "pixtral"},
            "image_token_id": 290,
            "tie_word_embeddings": False,
        },
    ),
}
"""Models that also see, with the language model inside: class, configuration, architecture of the text model, rest."""
