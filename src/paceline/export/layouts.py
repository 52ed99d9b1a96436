"""What a published draft must hold, written down from the engines' side and not from our draft modules.

Neither vLLM nor SGLang notices a missing weight, and SGLang none that it does not know: so the whole table is compared.
Source: ALGORITHMS, both "Layouts" sections (checked in vLLM 0.22-0.33 and SGLang 0.5.14-0.5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paceline.config.drafts import DFlashConfig, DraftConfig
from paceline.schema.target_info import TargetInfo


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """What a layout is judged by: the draft's settings and its target, nothing the draft says of itself."""

    config: DraftConfig
    info: TargetInfo
    layers: tuple[int, ...]
    """Capture layers, 0-based."""
    draft_vocab_size: int
    """D."""
    include_embedding: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes under their published names."""
        num_heads = self.config.num_heads or self.info.num_heads
        return {
            "hidden_size": self.info.hidden_size,
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.config.num_kv_heads or min(self.info.num_kv_heads, num_heads),
            "head_dim": self.config.head_dim or self.info.head_dim,
            "intermediate_size": (
                self.config.intermediate_size or self.info.intermediate_size or 3 * self.info.hidden_size
            ),
            "vocab_size": self.info.vocab_size,
        }


Table = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by tensor name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout."""

    tensors: Callable[[DraftFacts], Table]
    wrong_config: Callable[[Mapping[str, Any], DraftFacts], list[str]]
    """What is wrong with a config.json, one sentence each."""


def find_layout(published: Mapping[str, Any]) -> Layout | None:
    """The layout of a config.json's architecture; None for one we have no table of (another package's algorithm)."""
    architectures = published.get("architectures") or []
    return _LAYOUTS.get(architectures[0]) if len(architectures) == 1 else None


def differing_tensors(expected: Table, found: Table) -> list[str]:
    """What differs between two tables, one sentence a tensor."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} does not belong to the layout" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        (shape, dtype), (found_shape, found_dtype) = expected[name], found[name]
        if shape != found_shape:
            problems.append(f"{name} has shape {list(found_shape)}, the layout says {list(shape)}")
        if dtype != found_dtype:
            problems.append(f"{name} is {found_dtype}, the layout says {dtype}")
    return problems


def _eagle3_tensors(facts: DraftFacts) -> Table:
    sizes, dtype = facts.sizes, _dtype(facts)
    hidden = sizes["hidden_size"]
    table: Table = {
        "midlayer.hidden_norm.weight": ((hidden,), dtype),
        "fc.weight": ((hidden, len(facts.layers) * hidden), dtype),
        "norm.weight": ((hidden,), dtype),
        "lm_head.weight": ((facts.draft_vocab_size, hidden), dtype),
        # q, k, v read the embedding and the state, concatenated.
        **_layer_tensors("midlayer", sizes, dtype, attention_input=2 * hidden),
    }
    if facts.draft_vocab_size != sizes["vocab_size"]:
        table["t2d"] = ((sizes["vocab_size"],), torch.bool)
        table["d2t"] = ((facts.draft_vocab_size,), torch.int64)
    if facts.include_embedding:
        table["embed_tokens.weight"] = ((sizes["vocab_size"], hidden), dtype)
    return table


def _dflash_tensors(facts: DraftFacts) -> Table:
    assert isinstance(facts.config, DFlashConfig)
    sizes, dtype = facts.sizes, _dtype(facts)
    hidden, head_dim = sizes["hidden_size"], sizes["head_dim"]
    table: Table = {
        "fc.weight": ((hidden, len(facts.layers) * hidden), dtype),
        "hidden_norm.weight": ((hidden,), dtype),
        "norm.weight": ((hidden,), dtype),
    }
    for i in range(facts.config.num_layers):
        table |= _layer_tensors(f"layers.{i}", sizes, dtype, attention_input=hidden)
        table[f"layers.{i}.self_attn.q_norm.weight"] = ((head_dim,), dtype)
        table[f"layers.{i}.self_attn.k_norm.weight"] = ((head_dim,), dtype)
    return table


def _layer_tensors(prefix: str, sizes: Mapping[str, int], dtype: torch.dtype, attention_input: int) -> Table:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, attention_input),
        "self_attn.k_proj": (keys, attention_input),
        "self_attn.v_proj": (keys, attention_input),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"{prefix}.{name}.weight": (shape, dtype) for name, shape in shapes.items()}


def _wrong_eagle3_config(published: Mapping[str, Any], facts: DraftFacts) -> list[str]:
    # "qwen3" would make vLLM build q and k norms that the draft does not have, silently.
    expected = {"model_type": "llama", "num_hidden_layers": 1, "draft_vocab_size": facts.draft_vocab_size}
    problems = _wrong_values(published, expected) + _wrong_shared_config(published, facts, num_layers=1)
    if published.get("norm_before_residual") not in (None, False):
        problems.append("norm_before_residual must be false: the residual is the state before its norm")
    num_layers = facts.info.num_layers
    is_default = facts.layers == (1, num_layers // 2 - 1, num_layers - 4)
    nested = (published.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    places = {
        "eagle_config.eagle_aux_hidden_state_layer_ids": (nested, list(facts.layers)),
        "eagle_aux_hidden_state_layer_ids": (
            published.get("eagle_aux_hidden_state_layer_ids"),
            [layer + 1 for layer in facts.layers],
        ),
        "num_aux_hidden_states": (published.get("num_aux_hidden_states"), len(facts.layers)),
    }
    for key, (found, wanted) in places.items():
        if found != wanted and not (is_default and found is None):
            problems.append(f"{key} is {found!r}, must be {wanted!r}")
    return problems


def _wrong_dflash_config(published: Mapping[str, Any], facts: DraftFacts) -> list[str]:
    config = facts.config
    assert isinstance(config, DFlashConfig)
    layer_types = list(config.layer_types or ["full_attention"] * config.num_layers)
    expected = {
        "model_type": "qwen3",
        "num_hidden_layers": config.num_layers,
        "block_size": config.block_size,
        "num_target_layers": facts.info.num_layers,
        "layer_types": layer_types,
    }
    problems = _wrong_values(published, expected) + _wrong_shared_config(published, facts, config.num_layers)
    own = published.get("dflash_config") or {}
    mask = facts.info.mask_token_id if config.mask_token_id is None else config.mask_token_id
    problems += _wrong_values(own, {"mask_token_id": mask, "target_layer_ids": list(facts.layers)}, "dflash_config.")
    if "sliding_attention" in layer_types:
        # Engines serve sliding layers causal by themselves; a flag speaks for all layers at once.
        if "is_causal" in published or "causal" in own:
            problems.append("is_causal and dflash_config.causal must be left out with sliding layers")
        if not published.get("sliding_window"):
            problems.append("sliding_window is not set, and there are sliding layers")
    return problems


def _wrong_shared_config(published: Mapping[str, Any], facts: DraftFacts, num_layers: int) -> list[str]:
    info = facts.info
    expected = {
        **facts.sizes,
        "rms_norm_eps": info.norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        # transformers 5 drops the first, and readers that know no other then take 10000.
        "rope_theta": info.rope.theta,
        "rope_scaling": info.rope.scaling,
        "max_position_embeddings": info.max_position_embeddings,
        # Without these SGLang loads fp16.
        "torch_dtype": info.dtype,
        "dtype": info.dtype,
    }
    problems = _wrong_values(published, expected)
    scaling = info.rope.scaling or {}
    rope = {"rope_type": "default"} | scaling | {"rope_theta": info.rope.theta}
    found = {key: value for key, value in (published.get("rope_parameters") or {}).items() if key != "type"}
    rope.pop("type", None)
    if found != rope:
        problems.append(f"rope_parameters is {published.get('rope_parameters')!r}, must be {rope!r}")
    if "layer_types" in published and len(published["layer_types"] or []) != num_layers:
        problems.append(f"layer_types must have one entry a draft layer ({num_layers})")
    foreign = ("quantization_config", "partial_rotary_factor", "mrope_section", "text_config")
    problems += [f"{key} is the target's and must be left out" for key in foreign if key in published]
    return problems


def _wrong_values(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{key} is {found[key]!r}, must be {value!r}" if key in found else f"{prefix}{key} is missing"
        for key, value in expected.items()
        # A key that must be null may not be left out either: an older reader would fill in a default.
        if key not in found or found[key] != value or isinstance(found[key], bool) != isinstance(value, bool)
    ]


def _dtype(facts: DraftFacts) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, facts.info.dtype)
    return dtype


_LAYOUTS = {
    "LlamaForCausalLMEagle3": Layout(_eagle3_tensors, _wrong_eagle3_config),
    "DFlashDraftModel": Layout(_dflash_tensors, _wrong_dflash_config),
}
