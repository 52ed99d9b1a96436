"""TargetInfo of a transformers model: from its configuration, its tokenizer and, where it can be, from itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.target_info import LogitTransform, RopeInfo, TargetInfo
from paceline.target.hf.fingerprint import fingerprint_tokenizer, fingerprint_weights
from paceline.target.hf.loading import EXPERT_COUNTS, ModelParts
from paceline.target.hf.selftest import check_logits, measure_embedding_scale

_KEPT_ROPE_FIELDS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"},
}
"""What transformers, vLLM and SGLang compute the same frequencies and the same scale of attention from. Of yarn's other
fields (mscale, mscale_all_dim, attention_factor, truncate) each reads some: a draft that had them would be served
otherwise than it was trained."""
_LATENT_KV_HEADS = 8
"""Key/value heads of a draft for a target with latent attention, as published drafts for such targets have."""
_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def build_target_info(
    config: TargetConfig, checkpoint: Path, parts: ModelParts, tokenizer: PreTrainedTokenizerBase
) -> TargetInfo:
    """Every fact about the loaded target; its logits are rebuilt once and compared.

    Raises:
        TargetError: an unknown logit transform, or a tokenizer with more ids than the embedding has rows.
    """
    text = parts.config
    transform = read_logit_transform(text, has_bias=getattr(parts.lm_head, "bias", None) is not None)
    check_logits(parts, transform)
    num_heads, num_kv_heads, head_dim = read_heads(text)
    num_tokenizer_tokens = count_tokenizer_tokens(tokenizer)
    if num_tokenizer_tokens > parts.vocab_size:
        raise TargetError(
            f"the tokenizer of {config.model} makes ids up to {num_tokenizer_tokens - 1}, its embedding has "
            f"{parts.vocab_size} rows: they do not belong together"
        )
    return TargetInfo(
        name=config.model,
        model_type=text.model_type,
        num_layers=len(parts.layers),
        hidden_size=text.hidden_size,
        intermediate_size=dense_mlp_width(text),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=parts.vocab_size,
        num_tokenizer_tokens=num_tokenizer_tokens,
        norm_eps=next((float(v) for v in (getattr(text, name, None) for name in _NORM_EPS) if v is not None), 1e-6),
        rope=read_rope(text),
        max_position_embeddings=text.max_position_embeddings,
        layer_types=_layer_types(text),
        sliding_window=_sliding_window(text),
        dtype=str(parts.state_dtype).removeprefix("torch."),
        tied_embeddings=_is_tied(parts),
        embedding_scale=measure_embedding_scale(parts),
        logit_transform=transform,
        num_position_axes=_num_position_axes(text),
        eos_token_ids=_eos_token_ids(parts, tokenizer),
        mask_token_id=choose_mask_token(tokenizer, parts.vocab_size),
        weight_fingerprint=fingerprint_weights(checkpoint),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        deterministic=True,
    )


def read_logit_transform(text: PretrainedConfig, has_bias: bool = False) -> LogitTransform:
    """The transform a configuration announces; `check_logits` says whether it is the whole truth."""
    scale = float(getattr(text, "logit_scale", None) or 1.0) * float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    cap = next((float(v) for v in (getattr(text, name, None) for name in _SOFT_CAPS) if v), None)
    return LogitTransform(scale=scale, soft_cap=cap, has_bias=has_bias)


def read_rope(text: PretrainedConfig) -> RopeInfo:
    """Theta and, for llama3, yarn and linear, the scaling; of full attention where layer types differ.

    A draft turns whole heads by one position a token: partial and multimodal rotation are not copied.
    """
    parameters: dict[str, Any] = dict(getattr(text, "rope_parameters", None) or {})
    for layer_type in ("full_attention", "sliding_attention"):
        if isinstance(parameters.get(layer_type), dict):  # one set a layer type (Gemma 3)
            parameters = dict(parameters[layer_type])
            break
    theta = parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0
    kind = parameters.get("rope_type")
    if kind not in _KEPT_ROPE_FIELDS or parameters.get("factor") is None:
        return RopeInfo(theta=float(theta))
    kept = {name: parameters[name] for name in _KEPT_ROPE_FIELDS[kind] & parameters.keys()}
    return RopeInfo(theta=float(theta), scaling={"rope_type": kind} | {name: kept[name] for name in sorted(kept)})


def read_heads(text: PretrainedConfig) -> tuple[int, int, int]:
    """(heads, key/value heads, width of a head) of the attention.

    Latent attention (DeepSeek) has no key/value heads to store, and two widths: that of values is taken, and 8
    key/value heads, or fewer where 8 do not divide the heads.
    """
    num_heads = int(text.num_attention_heads)
    if getattr(text, "kv_lora_rank", None):
        return num_heads, math.gcd(num_heads, _LATENT_KV_HEADS), int(text.v_head_dim)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    return num_heads, num_kv_heads, int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)


def count_tokenizer_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id the tokenizer can produce."""
    return max(tokenizer.get_vocab().values()) + 1


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """The tokenizer's mask token, else the first embedding row that no text uses; None where all are used."""
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    first_unused = count_tokenizer_tokens(tokenizer)
    return first_unused if first_unused < vocab_size else None


def dense_mlp_width(text: PretrainedConfig) -> int | None:
    """Of the layers without experts; None where every layer has them."""
    width: int | None = getattr(text, "intermediate_size", None)
    if all((getattr(text, name, None) or 0) <= 1 for name in EXPERT_COUNTS):
        return width
    moe_layers = getattr(text, "moe_layers", None)  # Llama 4, where intermediate_size is that of an expert
    if moe_layers is not None and len(moe_layers) < text.num_hidden_layers:
        return getattr(text, "intermediate_size_mlp", None)
    return width if getattr(text, "first_k_dense_replace", None) else None


def _layer_types(text: PretrainedConfig) -> tuple[str, ...] | None:
    types = getattr(text, "layer_types", None)
    return None if types is None else tuple(types)


def _sliding_window(text: PretrainedConfig) -> int | None:
    """None where no layer uses the window the configuration names."""
    types = _layer_types(text)
    if types is not None and "sliding_attention" not in types:
        return None
    return getattr(text, "sliding_window", None)


def _is_tied(parts: ModelParts) -> bool:
    embedding, head = (getattr(module, "weight", None) for module in (parts.embedding, parts.lm_head))
    return isinstance(embedding, torch.Tensor) and embedding is head


def _num_position_axes(text: PretrainedConfig) -> int:
    parameters = getattr(text, "rope_parameters", None) or {}
    return 3 if parameters.get("mrope_section") else 1


def _eos_token_ids(parts: ModelParts, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids: set[int] = set()
    for config in (parts.model.generation_config, parts.config):
        value = getattr(config, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    if not ids and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
