"""What production engines do not return is computed here: the target's last norm and lm_head, without its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.capture import RowCapture
from paceline.target.hf.info import build_target_info
from paceline.target.hf.loading import (
    ModelParts,
    find_parts,
    load_config,
    load_model,
    load_tokenizer,
    read_quantization,
    resolve_checkpoint,
    resolve_device,
)

_OF_THE_ENGINE = {"tensor_parallel": 1, "device_map": None}
"""How the engine spreads its layers is nothing to what is computed here, in one process."""


@dataclass(frozen=True, slots=True)
class OuterParts:
    """A target without its decoder layers."""

    info: TargetInfo
    norm: nn.Module
    """From the last decoder layer's output to the final hidden state."""
    lm_head: nn.Module
    capture: RowCapture
    """Only its `complete` can be used."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase


def load_outer_parts(config: TargetConfig) -> OuterParts:
    """Embedding, last norm and lm_head of the checkpoint, and the facts that are proved on them.

    The facts need a model that runs, so the first decoder layer is loaded too, and let go of.

    Raises:
        TargetError: the checkpoint cannot be loaded or described, or has no single last norm.
    """
    config = config.model_copy(update=_OF_THE_ENGINE)
    device = resolve_device(config.device)
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    whole = load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True)
    parts = find_parts(load_model(config, checkpoint, device, num_layers=1))
    if read_quantization(checkpoint) is not None:
        _fill(parts.layers)
    tokenizer = load_tokenizer(str(checkpoint), None, config.trust_remote_code)
    facts = build_target_info(config, checkpoint, replace(parts, config=whole), tokenizer)
    # An engine that puts requests together as they come computes other last bits each time.
    info = facts.model_copy(update={"num_layers": int(whole.num_hidden_layers), "deterministic": False})
    norm = _find_last_norm(parts)
    capture = RowCapture(parts, info.logit_transform, "padded", config.vocab_chunk_tokens)
    del parts.layers[:]
    return OuterParts(info, norm, parts.lm_head, capture, device, tokenizer)


@torch.no_grad()
def _fill(layers: nn.Module) -> None:
    """Ordinary numbers for a layer that is thrown away: packed weights taken for plain ones may overflow."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layers.parameters():
        numbers = torch.ones(1) if parameter.dim() < 2 else torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.copy_(numbers.expand(parameter.shape))


@torch.no_grad()
def _find_last_norm(parts: ModelParts) -> nn.Module:
    """The module of the body whose output is the body's output."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[module] = output

    handles = [module.register_forward_hook(keep) for module in parts.body.children()]
    try:
        tokens = torch.arange(2, device=parts.device)[None]
        final = parts.body(input_ids=tokens, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    found = [module for module, output in outputs.items() if output.shape == final.shape and torch.equal(output, final)]
    if len(found) != 1:
        raise TargetError(
            f"{type(parts.body).__name__}: {len(found)} modules return the final hidden states, expected exactly one "
            '(the last norm): use target.engine = "hf"'
        )
    return found[0]
