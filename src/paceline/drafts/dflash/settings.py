"""What a DFlash configuration means for one target: sizes, layers, mask token, loss weights; all checks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.config.drafts import DFlashConfig
from paceline.drafts.dflash.model import Sizes
from paceline.drafts.layers_spec import choose_layers
from paceline.errors import ConfigError
from paceline.schema.target_info import TargetInfo

_PUBLISHED_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


@dataclass(frozen=True, slots=True, eq=False)
class DFlashSettings:
    """A configuration with everything filled in from the target."""

    layers: tuple[int, ...]
    """Capture layers."""
    mask_token_id: int
    slot_weights: np.ndarray
    """fp32[B]: w_k = exp(-(k - 1) / gamma); slot 0 weighs nothing."""
    sizes: Sizes


def derive_settings(config: DFlashConfig, info: TargetInfo) -> DFlashSettings:
    """Fill in what the configuration leaves to the target.

    Raises:
        ConfigError: a value that cannot work for this target; names both sides and the remedy.
    """
    layers = choose_layers(config.target_layers, default_layers(info.num_layers, config.num_layers), info)
    gamma = config.loss_gamma or _PUBLISHED_GAMMA.get(config.block_size, 7.0 * config.block_size / 16)
    weights = np.exp(-(np.arange(config.block_size) - 1) / gamma).astype(np.float32)
    weights[0] = 0.0
    return DFlashSettings(layers, _mask_token(config, info), weights, _sizes(config, info, len(layers)))


def default_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """round(1 + i (N - 4) / (n - 1)), or N // 2 for one; may repeat a layer or leave 0..N-2 for tiny targets."""
    if count == 1:
        return (num_layers // 2,)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))


def _mask_token(config: DFlashConfig, info: TargetInfo) -> int:
    mask = info.mask_token_id if config.mask_token_id is None else config.mask_token_id
    if mask is None:
        raise ConfigError(
            f"{info.name} has no mask token and no unused embedding row ({info.vocab_size} rows, "
            f"{info.num_tokenizer_tokens} tokens): set mask_token_id to a token that never occurs in text"
        )
    if mask >= info.vocab_size:
        raise ConfigError(
            f"mask_token_id = {mask} has no embedding row: the target has {info.vocab_size}, choose a smaller one"
        )
    if mask < info.num_tokenizer_tokens and mask != info.mask_token_id:
        raise ConfigError(
            f"mask_token_id = {mask} is a token of text (ids below {info.num_tokenizer_tokens} are): leave it out or "
            f"choose an unused embedding row from {info.num_tokenizer_tokens} to {info.vocab_size - 1}"
        )
    return mask


def _sizes(config: DFlashConfig, info: TargetInfo, num_captured: int) -> Sizes:
    heads = config.num_heads or info.num_heads
    kv_heads = config.num_kv_heads or info.num_kv_heads
    head_dim = config.head_dim or info.head_dim
    if heads % kv_heads:
        raise ConfigError(f"num_heads = {heads} is not a multiple of num_kv_heads = {kv_heads}: change one of them")
    if head_dim % 2:
        raise ConfigError(f"head_dim = {head_dim} is odd, rotary positions pair its halves: take {head_dim + 1}")
    return Sizes(
        hidden_size=info.hidden_size,
        num_captured=num_captured,
        intermediate_size=config.intermediate_size or info.intermediate_size or 3 * info.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=info.norm_eps,
        block_size=config.block_size,
        windows=_windows(config),
    )


def _windows(config: DFlashConfig) -> tuple[int | None, ...]:
    types = config.layer_types or ("full_attention",) * config.num_layers
    if len(types) != config.num_layers:
        raise ConfigError(
            f"layer_types has {len(types)} entries for num_layers = {config.num_layers} draft layers: give one for each"
        )
    slides = "sliding_attention" in types
    if slides and config.sliding_window is None:
        raise ConfigError(
            f"layer_types = {list(types)} has sliding layers, sliding_window is not set: set it, or make all layers "
            "full_attention"
        )
    if config.sliding_window is not None and not slides:
        raise ConfigError(
            f"sliding_window = {config.sliding_window}, but layer_types = {list(types)} has no sliding layer: name the "
            "sliding layers in layer_types, or leave sliding_window out"
        )
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)
