"""config.json of published targets, without weights: enough to plan a run"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config, Qwen3MoeConfig


def save_qwen3_8b(path: Path) -> Path:
    """Qwen3-8B."""
    config = Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    return path


def save_qwen3_30b_a3b(path: Path) -> Path:
    """Qwen3-30B-A3B: 128 experts, 8 at a time."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    return path
