"""A target ready to compute features: loaded, described, proved, and compiled where that is asked for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.schema.features import FeatureSpec
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.capture import Layout, RowCapture
from paceline.target.hf.info import build_target_info
from paceline.target.hf.loading import ModelParts, find_parts, load_model, load_tokenizer
from paceline.target.hf.selftest import choose_layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """What one process holds of a target: all of it, or a rank's share."""

    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    info: TargetInfo
    layout: Layout
    capture: RowCapture


def load_target(config: TargetConfig, checkpoint: Path, device: torch.device) -> LoadedTarget:
    """The target of `config`, its weights from the directory `checkpoint`.

    With tensor parallelism every rank calls this with the same configuration: the forwards in it are the same, in the
    same order.

    Raises:
        TargetError: it cannot be loaded or described.
        OutOfMemoryError: it does not fit on the device.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tokenizer = load_tokenizer(str(checkpoint), None, config.trust_remote_code)
    parts = find_parts(load_model(config, checkpoint, device))
    info = build_target_info(config, checkpoint, parts, tokenizer)
    layout = choose_layout(parts, config)
    if config.compile:
        for layer in parts.layers:
            # The forward alone: hooks stay outside of the compiled code, where adding one recompiles nothing.
            layer.forward = torch.compile(layer.forward)
    logger.info("target %s on %s in %s, documents %s", config.model, parts.device, info.dtype, layout)
    capture = RowCapture(parts, info.logit_transform, layout, config.vocab_chunk_tokens)
    if config.compile:
        _compile(capture, info)
    return LoadedTarget(parts, tokenizer, info, layout, capture)


def _compile(capture: RowCapture, info: TargetInfo) -> None:
    """Compile before the first row is asked for: no other thread may run compiled code while this one traces.

    Two rows of different lengths: after the second torch.compile takes rows of any length.
    """
    begin = time.monotonic()
    for lengths in ((160, 352), (90, 230, 400)):
        documents = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        request = RowRequest(
            position=0,
            spec="",
            tokens=np.arange(documents[-1], dtype=np.int32) % info.vocab_size,
            documents=documents,
            spans=np.array([[0, lengths[0]]], np.int32),
            positions=np.broadcast_to(positions, (info.num_position_axes, len(positions))).copy(),
        )
        capture(request, FeatureSpec(layers=(0,), final_hidden="supervised", greedy=True))
    logger.info("target compiled in %.0f s", time.monotonic() - begin)
