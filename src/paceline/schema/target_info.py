"""TargetInfo: every fact about a target that a trainer may rely on, versioned and plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class LogitTransform(BaseModel):
    """How a final hidden state becomes logits: soft_cap(scale * (W h + bias))."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = 1.0
    """Multiplies the logits (Cohere's `logit_scale`; Granite's 1 / `logits_scaling`)."""
    soft_cap: float | None = None
    """cap * tanh(logits / cap), after scaling (Gemma 2)."""
    has_bias: bool = False
    """Whether the lm_head has a bias of its own."""


class RopeInfo(BaseModel):
    """Rotary embedding of the target, as far as a draft may copy it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = 10000.0
    scaling: dict[str, Any] | None = None
    """Only llama3, yarn or linear scaling is kept, and of them what all engines read alike; None otherwise."""


class TargetInfo(BaseModel):
    """What a server says about its target; equal facts mean interchangeable targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    """Path or hub id it was loaded from."""
    model_type: str
    """transformers' name of the (text) architecture, e.g. "qwen3"."""
    num_layers: int
    hidden_size: int
    intermediate_size: int | None
    """None for a target without a dense MLP (experts in every layer)."""
    num_heads: int
    num_kv_heads: int
    """As a draft may copy it: 8 (or a divisor) for latent attention, which has none of its own."""
    head_dim: int
    """Of values, where keys are wider."""
    vocab_size: int
    """V: rows of the embedding, padding rows included."""
    num_tokenizer_tokens: int
    """Ids the tokenizer can produce are below this."""
    norm_eps: float
    rope: RopeInfo
    max_position_embeddings: int
    layer_types: tuple[str, ...] | None = None
    """The target's own list, one entry a layer, or None if it has none."""
    sliding_window: int | None = None
    dtype: str
    """Dtype of features: "float32", "bfloat16" or "float16"."""
    tied_embeddings: bool
    embedding_scale: float = 1.0
    logit_transform: LogitTransform = LogitTransform()
    num_position_axes: int = 1
    """1, or 3 for mRoPE."""
    eos_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    """The tokenizer's mask token, else the first embedding row no token uses, else None."""
    weight_fingerprint: str
    tokenizer_fingerprint: str
    deterministic: bool
    """Whether a row's features are independent of whatever else the engine runs."""
