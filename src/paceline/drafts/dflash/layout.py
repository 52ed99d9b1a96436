"""The published layout of a DFlash draft (z-lab): one folder for SGLang, vLLM and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.drafts.dflash.settings import DFlashSettings
from paceline.drafts.published import dtype_fields, published_scaling, published_theta, rope_fields
from paceline.errors import DraftError
from paceline.schema.target_info import TargetInfo


def published_config(settings: DFlashSettings, info: TargetInfo) -> dict[str, Any]:
    """config.json. `is_causal` and `dflash_config.causal` are left out: engines derive them from `layer_types`."""
    sizes = settings.sizes
    window = next((window for window in sizes.windows if window is not None), None)
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": sizes.block_size,
        "dflash_config": {"mask_token_id": settings.mask_token_id, "target_layer_ids": list(settings.layers)},
        "num_target_layers": info.num_layers,
        "num_hidden_layers": len(sizes.windows),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in sizes.windows],
        "sliding_window": window,
        # Qwen3's configuration drops `sliding_window` unless this says so.
        "use_sliding_window": window is not None,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": info.vocab_size,
        "tie_word_embeddings": False,
        **rope_fields(info),
        **dtype_fields(info),
    }


def check_published(published: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise DraftError unless a published configuration means the same draft as ours; names both values."""
    theirs = _conventions(published)
    different = [
        f"{key}: {theirs[key]!r} published, {value!r} here"
        for key, value in _conventions(ours).items()
        if theirs[key] != value
    ]
    if different:
        raise DraftError(
            f"the published draft does not fit: {'; '.join(different)}; set these in [drafts.NAME], or take a draft "
            "made for this target"
        )


def _conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree beyond names and shapes; a weight trained under another convention would load silently."""
    own = config.get("dflash_config") or {}
    num_layers = config.get("num_hidden_layers") or 0
    types = list(config.get("layer_types") or ["full_attention"] * num_layers)
    return {
        "architectures": list(config.get("architectures") or []),
        "block_size": config.get("block_size"),
        "mask_token_id": own.get("mask_token_id"),
        "target_layer_ids": list(own.get("target_layer_ids") or []),
        "num_target_layers": config.get("num_target_layers"),
        "layer_types": types,
        "sliding_window": config.get("sliding_window") if "sliding_attention" in types else None,
        "causal": bool(own.get("causal") or config.get("is_causal")),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_key_value_heads": config.get("num_key_value_heads"),
        "rope_theta": published_theta(config),
        "rope_scaling": published_scaling(config),
        "rms_norm_eps": config.get("rms_norm_eps"),
        "vocab_size": config.get("vocab_size"),
    }
