"""Tiny random checkpoints and a tokenizer, made in milliseconds, for tests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from architectures import ABSENT, ARCHITECTURES, NESTED
from paceline.schema.rows import RowRequest

VOCAB_SIZE = 300
"""Embedding rows of tiny targets: 256 bytes, five special tokens, the rest padding rows."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"]


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
    """A configuration with 4 layers, hidden 32, 4 heads of 8 and 2 kv heads, unless the architecture says
    otherwise.

    Args:
        architecture: a key of `ARCHITECTURES`.
    """
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
    }
    config_class, own = ARCHITECTURES[architecture]
    settings = {name: value for name, value in (shapes | own | changes).items() if value is not ABSENT}
    return config_class(**settings)


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


def save_nested_tiny_target(path: Path, kind: str = "qwen3_5", seed: int = 0) -> Path:
    """Write a model that also sees, its text model nested in it (`text_config`, `model.language_model.*`).

    Args:
        kind: a key of `NESTED`.
    """
    torch.manual_seed(seed)
    model_class, config_class, architecture, rest = NESTED[kind]
    model_class(config_class(text_config=tiny_config(architecture).to_dict(), **rest)).save_pretrained(path)
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
