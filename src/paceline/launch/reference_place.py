"""Where the self-test's reference is computed, and in which data type: the best for which there is memory."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.memory import free_memory
from paceline.target.engines.steps import num_computers
from paceline.target.hf.loading import read_quantization, resolve_device, resolve_dtype
from paceline.target.hf.stored_tensors import read_tensor_table
from paceline.target.opening import ENGINES
from paceline.target.selftest.texts import KnownTexts

_BLOCK_SCALES = ".weight_scale_inv"
"""Names of the scales of weights in blocks end so."""
_ROOM = 1.3
"""A model takes so many times its weights while it computes a text."""


@dataclass(frozen=True, slots=True)
class Place:
    """For one process of transformers, which is over before the engine starts."""

    device: torch.device
    """All of it, or what is not spread."""
    dtype: str
    spread: Mapping[int, int] = field(default_factory=dict)
    """Bytes of weights that each of several GPUs may take; of none, where one device is enough."""


def find_place(checkpoint: Path, config: TargetConfig, text_bytes: int, exact: bool = False) -> Place:
    """fp32 where there is room, since bf16 of transformers is itself 1 to 2 % off; GPUs of the engine before the host.

    Args:
        text_bytes: beside the weights, see `bytes_of_text`.
        exact: in float32 or not at all.

    Raises:
        TargetError: there is room nowhere.
    """
    device, dtype = resolve_device(config.device), resolve_dtype(config, checkpoint)
    if read_quantization(checkpoint) is not None and not is_unpacked(checkpoint):
        return Place(device, "auto")  # it may need the device's kernels
    num_weights = sum(math.prod(tensor.shape) for tensor in read_tensor_table(checkpoint).values())
    kinds = ["float32"] if exact else ["float32", dtype]
    needs = {kind: num_weights * getattr(torch, kind).itemsize for kind in kinds}
    if device.type == "cuda":
        for kind, weight_bytes in needs.items():
            for place in _on_gpus(device, kind, config, text_bytes):
                if weight_bytes * _ROOM < (sum(place.spread.values()) or _room_on(device, text_bytes)):
                    return place
    free = free_memory()
    for kind, weight_bytes in needs.items():
        if weight_bytes * _ROOM + text_bytes < free:
            return Place(torch.device("cpu"), kind)
    least, weight_bytes = list(needs.items())[-1]
    raise TargetError(
        f"transformers in {least} needs {(weight_bytes * _ROOM + text_bytes) / 1e9:.0f} GB for the self-test's "
        f"reference, {free / 1e9:.0f} GB are free on the host: make it elsewhere (paceline doctor MODEL "
        "--save-reference FILE) and name it (target.selftest_reference), or do without (target.selftest = false)"
    )


def _on_gpus(device: torch.device, dtype: str, config: TargetConfig, text_bytes: int) -> Iterator[Place]:
    """One GPU; then all that the engine will have, where accelerate is there to spread a model."""
    yield Place(device, dtype)
    first = device.index or 0
    num = config.tensor_parallel if config.engine == "hf" else num_computers(ENGINES[config.engine], config)
    gpus = range(first, min(first + num, torch.cuda.device_count()))
    if len(gpus) > 1 and importlib.util.find_spec("accelerate") is not None:
        yield Place(device, dtype, {gpu: _room_on(torch.device("cuda", gpu), text_bytes) for gpu in gpus})


def _room_on(gpu: torch.device, text_bytes: int) -> int:
    """Bytes for weights."""
    return max(0, torch.cuda.mem_get_info(gpu)[0] - text_bytes)


def bytes_of_text(text_config: Any, texts: KnownTexts) -> int:
    """In fp32, of the longest text: attention's scores and their softmax, all layers' states, logits."""
    num_tokens = max(len(text.tokens) for text in texts.documents)
    scores = 3 * num_tokens * int(getattr(text_config, "num_attention_heads", None) or 0)
    states = int(text_config.num_hidden_layers) * int(text_config.hidden_size)
    return 4 * num_tokens * (scores + states + 2 * int(text_config.vocab_size))


def is_unpacked(checkpoint: Path) -> bool:
    """Whether transformers makes plain weights of it, anywhere: fp8 in whole blocks, as of Qwen3-8B-FP8.

    Scales of a whole tensor have another name, which transformers passes over; and where a tensor's last blocks are
    smaller (DeepSeek-V3) it takes all for blocks of one size.
    """
    found = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    block = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or not block:
        return False
    table = read_tensor_table(checkpoint)
    scaled = [
        (table.get(name.removesuffix("_scale_inv")), table[name]) for name in table if name.endswith(_BLOCK_SCALES)
    ]
    return bool(scaled) and all(
        weight is not None and all(map(_is_whole, weight.shape[-2:], scales.shape[-2:], block))
        for weight, scales in scaled
    )


def _is_whole(size: int, num_blocks: int, length: int) -> bool:
    return num_blocks == 1 or num_blocks * length == size
