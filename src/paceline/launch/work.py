"""What a run computes and keeps, from the shapes of its models: products counted by hand, no device asked.

Counted are matrix products and attention, two operations a multiply-add. A backward pass costs twice a forward pass:
once for the states, once for the weights, and only once where either needs no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from paceline.config.drafts import DFlashConfig, DraftConfig, Eagle3Config
from paceline.config.run import RunConfig
from paceline.drafts.dflash.settings import derive_settings
from paceline.drafts.eagle3.algorithm import Eagle3, eagle3_shape
from paceline.drafts.vocabulary import DraftVocabulary
from paceline.errors import TargetError
from paceline.launch.target_facts import text_config
from paceline.schema.features import FeatureSpec
from paceline.schema.layout import ELEMENT_BYTES
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.loading import EXPERT_COUNTS

_STATE_BYTES = 16
"""fp32 of each draft weight: master, two moments, gradient."""
_UPDATE_BYTES = 30
"""Read and written a draft weight by an optimizer step."""
_FORWARD, _BOTH, _FROZEN = 2.0, 6.0, 4.0
"""Operations a weight and token: forward; with backward; with backward through weights or inputs without gradient."""
_ATTENTION_BOTH = 14.0
"""Operations a key, query and unit of width: 4 forward, 10 backward, which computes the scores once more."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of a run."""

    row_tokens: int
    rows_per_step: int
    supervised: float
    """Share of tokens."""
    document_tokens: float
    """Length of the document that a token is in, on average."""

    @property
    def supervised_context(self) -> float:
        """Tokens before a supervised one in its document: answers stand at the end."""
        return self.document_tokens * (1 - self.supervised / 2)


@dataclass(frozen=True, slots=True)
class TargetWork:
    """The forward pass of the target."""

    flops: float
    """A token."""
    weight_bytes: float
    scratch_bytes: float
    """Activations of a row and a chunk of logits."""
    has_experts: bool


@dataclass(frozen=True, slots=True)
class DraftWork:
    """Forward, backward and optimizer of a draft."""

    algorithm: str
    flops: float
    """A token."""
    num_weights: float
    frozen_bytes: float
    """Parts of the target the trainer holds for it: embedding and head."""
    activation_bytes: float
    """A row, kept for the backward pass."""
    keys_bytes: float
    """Keys and values of a row's tokens, in bf16, and their gradients."""
    update_bytes: float
    """Read and written by an optimizer step."""

    @property
    def weight_bytes(self) -> float:
        """bf16 weights and gradients."""
        return 4.0 * self.num_weights

    @property
    def state_bytes(self) -> float:
        return _STATE_BYTES * self.num_weights


def target_work(config: RunConfig, info: TargetInfo, spec: FeatureSpec, workload: Workload) -> TargetWork:
    """Of one capture; the model is built without memory, to count what it has.

    Raises:
        TargetError: a model that cannot be built from its configuration alone, or whose experts cannot be counted.
    """
    model, text = _empty_model(config), text_config(config.target)
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has one"
    outside = {id(weight) for part in (head, model.get_input_embeddings()) for weight in part.parameters()}
    num_head = sum(weight.numel() for weight in head.parameters())
    active = total = 0.0
    share = None
    for name, weight in model.named_parameters():
        total += weight.numel()
        if id(weight) in outside or weight.dim() < 2:
            continue
        if ".experts." in name:
            share = share or _active_share(text)
            active += weight.numel() * share
        else:
            active += weight.numel()
    # A head that no draft asks greedy tokens of is not computed.
    head_flops = _FORWARD * num_head if spec.greedy or spec.logsumexp else 0.0
    attention = 4.0 * workload.document_tokens / 2 * info.num_heads * info.head_dim * info.num_layers
    size = ELEMENT_BYTES[info.dtype]
    wide = 2 * (info.intermediate_size or 3 * info.hidden_size) + 6 * info.hidden_size
    return TargetWork(
        flops=_FORWARD * active + head_flops + attention,
        weight_bytes=size * total,
        scratch_bytes=workload.row_tokens * wide * size + 4.0 * config.target.vocab_chunk_tokens * info.vocab_size,
        has_experts=share is not None,
    )


def draft_work(config: DraftConfig, info: TargetInfo, workload: Workload) -> DraftWork | None:
    """Of one row; None for an algorithm of another package, which nobody here can count."""
    if isinstance(config, Eagle3Config):
        return _eagle3_work(config, info, workload)
    if isinstance(config, DFlashConfig):
        return _dflash_work(config, info, workload)
    return None


def _eagle3_work(config: Eagle3Config, info: TargetInfo, workload: Workload) -> DraftWork:
    vocab = min(config.vocab_size or info.vocab_size, info.vocab_size)
    vocabulary = DraftVocabulary(np.arange(vocab, dtype=np.int64), info.vocab_size)
    shape = eagle3_shape(config, info, len(Eagle3.feature_spec(config, info).layers), vocabulary)
    hidden, width = shape.hidden_size, shape.num_heads * shape.head_dim
    fuse = shape.num_states * hidden * hidden
    keys_values = 2 * 2 * hidden * shape.num_kv_heads * shape.head_dim
    rest = 2 * hidden * width + width * hidden + 3 * hidden * shape.intermediate_size
    head, depths = hidden * vocab, config.num_depths
    every_token = _FROZEN * fuse + _BOTH * keys_values
    every_slot = (
        depths * (_BOTH * (rest + head) + _ATTENTION_BOTH * workload.supervised_context * width)
        + (depths - 1) * _BOTH * keys_values
    )
    every_slot += _FORWARD * head  # the teacher, once for all depths
    slots = workload.supervised * workload.row_tokens * depths
    weights = fuse + keys_values + rest + head
    return DraftWork(
        algorithm="eagle3",
        flops=every_token + workload.supervised * every_slot,
        num_weights=weights,
        frozen_bytes=2.0 * (info.vocab_size * hidden + head),
        activation_bytes=slots * 2.0 * (3 * shape.intermediate_size + 16 * hidden),
        keys_bytes=workload.row_tokens * 8.0 * shape.num_kv_heads * shape.head_dim,
        update_bytes=_UPDATE_BYTES * weights,
    )


def _dflash_work(config: DFlashConfig, info: TargetInfo, workload: Workload) -> DraftWork:
    sizes = derive_settings(config, info).sizes
    hidden, width, block = sizes.hidden_size, sizes.num_heads * sizes.head_dim, sizes.block_size
    fuse = sizes.num_captured * hidden * hidden
    keys_values = 2 * hidden * sizes.num_kv_heads * sizes.head_dim
    layer = 2 * hidden * width + keys_values + 3 * hidden * sizes.intermediate_size
    num_layers, head = len(sizes.windows), hidden * info.vocab_size
    contexts = [min(window or np.inf, workload.supervised_context) for window in sizes.windows]
    every_token = _FROZEN * fuse + _BOTH * num_layers * keys_values
    every_slot = _BOTH * num_layers * layer + _ATTENTION_BOTH * float(sum(contexts)) * width
    every_slot += _FROZEN * head * (block - 1) / block  # the head is the target's: no gradient of it
    slots = block * min(1 / config.anchor_every, workload.supervised)
    weights = fuse + num_layers * layer
    return DraftWork(
        algorithm="dflash",
        flops=every_token + slots * every_slot,
        num_weights=weights,
        frozen_bytes=2.0 * 2 * info.vocab_size * hidden,
        activation_bytes=slots * workload.row_tokens * num_layers * 2.0 * (3 * sizes.intermediate_size + 7 * hidden),
        keys_bytes=workload.row_tokens * num_layers * 8.0 * sizes.num_kv_heads * sizes.head_dim,
        update_bytes=_UPDATE_BYTES * weights,
    )


def _empty_model(config: RunConfig) -> PreTrainedModel:
    target = config.target
    text = text_config(config.target)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(text, trust_remote_code=target.trust_remote_code)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError, RuntimeError) as error:
        raise TargetError(f"{target.model} cannot be counted from its configuration: {error}") from error
    return model


def _active_share(text: object) -> float:
    """Experts a token passes, of all."""
    for name in EXPERT_COUNTS:
        num = getattr(text, name, None)
        if num:
            return float(text.num_experts_per_tok) / float(num)  # type: ignore[attr-defined]
    raise TargetError("the experts of this target cannot be counted from its configuration")
