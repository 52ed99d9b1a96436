"""Tiny random checkpoints and a tokenizer, made in milliseconds, for tests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from paceline.schema.rows import RowRequest

VOCAB_SIZE = 300
"""Embedding rows of tiny targets: 256 bytes, five special tokens, the rest padding rows."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]

_ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
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
    # Caps small enough to bend the logits of tiny random weights.
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 6.0}),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 bytes + 5 special tokens, 261 in all) with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [s for s in _SPECIAL if s != "<|end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(architecture: str = "qwen3", **changes: Any) -> PretrainedConfig:
    """A configuration with 4 layers, hidden 32, 4 heads of 8, 2 kv heads; `architecture` is a key of _ARCHITECTURES."""
    shapes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
        "dtype": "float32",
    } | changes
    config_class, own = _ARCHITECTURES[architecture]
    return config_class(**(own | shapes))


def save_tiny_target(path: Path, architecture: str = "qwen3", seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint with its tokenizer and return `path`; weights large enough to be opinionated."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_nested_tiny_target(path: Path, seed: int = 0) -> Path:
    """Write a Qwen3.5 whose text model is nested in one that also sees: `text_config`, `model.language_model.*`."""
    torch.manual_seed(seed)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(
        text_config=tiny_config("qwen3_5").to_dict(),
        vision_config=vision | {"patch_size": 4, "num_position_embeddings": 16},
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    Qwen3_5ForConditionalGeneration(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_request(
    lengths: tuple[int, ...], seed: int = 0, num_position_axes: int = 1, spans: list[tuple[int, int]] | None = None
) -> RowRequest:
    """A request for random documents of these lengths."""
    documents = np.cumsum([0, *lengths]).astype(np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    return RowRequest(
        position=seed,
        spec="training",
        tokens=np.random.default_rng(seed).integers(0, VOCAB_SIZE, int(documents[-1]), dtype=np.int32),
        documents=documents,
        spans=np.array(spans or [], np.int32).reshape(-1, 2),
        positions=np.tile(positions, (num_position_axes, 1)),
    )
