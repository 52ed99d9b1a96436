"""The published EAGLE-3 layout (SGLang and vLLM load it): config.json, tensor names, reading it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paceline.config.drafts import Eagle3Config
from paceline.drafts.eagle3.model import Eagle3Shape
from paceline.drafts.interface import DraftContext
from paceline.drafts.published import check_names, dtype_fields, published_scaling, published_theta, rope_fields
from paceline.errors import DraftError
from paceline.schema.target_info import TargetInfo

_MUST_MATCH = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """1, N // 2 - 1, N - 4: what a draft that names no layers reads; may repeat one for tiny targets."""
    return (1, num_layers // 2 - 1, num_layers - 4)


def published_config(
    config: Eagle3Config, context: DraftContext, shape: Eagle3Shape, layers: tuple[int, ...]
) -> dict[str, Any]:
    """config.json. Nothing is copied from the target's own file: each key here is one that engines read."""
    info = context.info
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        # Whatever the target is: "qwen3" would make vLLM build q and k norms that EAGLE-3 does not have.
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": info.vocab_size,
        # Never null, also for D = V: SGLang would then put the target's lm_head in place of the draft's.
        "draft_vocab_size": shape.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": info.max_position_embeddings,
        **rope_fields(info),
        **dtype_fields(info),
        # SGLang reads the nested list and adds 1; vLLM prefers the top-level one, numbered from the embedding.
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "num_aux_hidden_states": len(layers),
        "norm_before_residual": False,
        "num_drafted_tokens": config.num_depths,
    }


def published_tensors(draft: nn.Module, context: DraftContext) -> dict[str, Tensor]:
    """Weights in the target's dtype; the vocabulary maps only where there is a map (D < V)."""
    dtype = getattr(torch, context.info.dtype)
    tensors = {name: w.detach().to(device="cpu", dtype=dtype).contiguous() for name, w in draft.state_dict().items()}
    if not context.vocabulary.is_full:
        tensors |= {"t2d": context.vocabulary.t2d(), "d2t": context.vocabulary.d2t()}
    return tensors


def load_published(
    draft: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    expected: dict[str, Any],
    context: DraftContext,
) -> None:
    """Take weights of a published draft of the same shape, vocabulary and layers; see the interface for errors."""
    if config.get("norm_output"):
        raise DraftError("the draft says norm_output: true (its feedback is normed): it cannot be trained on from here")
    if config.get("norm_before_residual"):
        raise DraftError("the draft says norm_before_residual: true: its residual is another than that of EAGLE-3")
    for key in (*_MUST_MATCH, "draft_vocab_size"):
        if key in config and config[key] != expected[key]:
            raise DraftError(f"{key} of the published draft is {config[key]}, this run's is {expected[key]}")
    for key, read in (("rope_theta", published_theta), ("rope_scaling", published_scaling)):
        if read(config) != read(expected):
            raise DraftError(f"{key} of the published draft is {read(config)}, this run's is {read(expected)}")
    theirs, ours = _published_layers(config, context.info), expected["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    if theirs != ours:
        raise DraftError(
            f"the published draft reads target layers {theirs}, this run captures {ours}: set target_layers"
        )
    named = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in tensors.items()}
    named.pop("embed_tokens.weight", None)
    t2d, d2t = named.pop("t2d", None), named.pop("d2t", None)
    _check_vocabulary(t2d, d2t, context)
    weights = draft.state_dict()
    check_names(weights, named)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(named[name])


def _published_layers(config: Mapping[str, Any], info: TargetInfo) -> list[int]:
    """Capture layers, 0-based; a configuration that names none means the default."""
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if nested is not None:
        return list(nested)
    # vLLM's list is numbered from the embedding.
    numbered = config.get("eagle_aux_hidden_state_layer_ids")
    return list(default_layers(info.num_layers)) if numbered is None else [layer - 1 for layer in numbered]


def _check_vocabulary(t2d: Tensor | None, d2t: Tensor | None, context: DraftContext) -> None:
    vocabulary = context.vocabulary
    if (t2d is None) != vocabulary.is_full:
        have, want = ("none", "one") if t2d is None else ("one", "none")
        raise DraftError(
            f"the published draft has {have} of the vocabulary maps, this run needs {want}: set vocab_size"
        )
    if t2d is None:
        return
    if not torch.equal(t2d.bool(), vocabulary.t2d()) or d2t is None or not torch.equal(d2t.long(), vocabulary.d2t()):
        raise DraftError(
            f"the published draft's vocabulary ({int(t2d.sum())} tokens) is not this run's ({vocabulary.size}): "
            "prepare the data with the same samples, or train a new draft"
        )
