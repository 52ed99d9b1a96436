"""Where the self-test's reference is computed, and in which data type: the best for which there is memory."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.memory import free_memory
from paceline.target.engines.steps import num_shards
from paceline.target.hf.loading import read_quantization, resolve_device, resolve_dtype
from paceline.target.hf.stored_tensors import read_tensor_table
from paceline.target.opening import ENGINES
from paceline.target.selftest.texts import KnownTexts

_BLOCK_SCALES = ".weight_scale_inv"
"""Names of the scales of weights in blocks end so."""
_GPU_ROOM, _HOST_ROOM = 1.3, 1.1
"""A model takes so many times its weights while it computes a text."""
_ASK = """
import sys, torch
for gpu in sys.argv[1:]:
    try:
        print(torch.cuda.mem_get_info(int(gpu))[0])
    except (AssertionError, RuntimeError):
        print(0)
"""
_ASK_S = 120.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """For one process of transformers, which is over before the engine starts."""

    device: torch.device
    """Where tokens go in; all of the model, unless it is spread."""
    dtype: str
    """That of packed weights, which stay as they are, is "auto"."""
    spread: Mapping[int, int] = field(default_factory=dict)
    """Bytes of weights that each of several GPUs may take; of none, where one device is enough."""


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes of a model in one data type."""

    weights: int
    text: int


def find_place(
    checkpoint: Path, config: TargetConfig, text_bytes: int, exact: bool = False, everywhere: bool = False
) -> Place:
    """fp32 where there is room, since bf16 of transformers is itself 1 to 2 % off; GPUs of the engine before the host.

    Args:
        text_bytes: in fp32, beside the weights; see `bytes_of_text`.
        exact: in float32 or not at all.
        everywhere: on all visible GPUs from the engine's first on, not the engine's alone.

    Raises:
        TargetError: there is room nowhere.
    """
    device, own = resolve_device(config.device), resolve_dtype(config, checkpoint)
    table = read_tensor_table(checkpoint).values()
    num_weights = sum(math.prod(tensor.shape) for tensor in table)
    packed = is_packed(checkpoint)
    dtypes = [own] if packed else ["float32"] if exact else ["float32", own]
    needs = {dtype: _Need(num_weights * _itemsize(dtype), text_bytes * _itemsize(dtype) // 4) for dtype in dtypes}
    if packed:
        needs = {"auto": _Need(sum(tensor.num_bytes for tensor in table), needs[own].text)}
    num_gpus = _num_gpus(config, device, everywhere)
    if num_gpus and (place := _on_gpus(needs, device, num_gpus)) is not None:
        return place
    if packed:
        return Place(device, "auto")  # it may need the device's kernels, and what they unpack is not known
    free = free_memory()
    for dtype, need in needs.items():
        if need.weights * _HOST_ROOM + need.text < free:
            return Place(torch.device("cpu"), dtype)
    least, need = list(needs.items())[-1]
    gpus = f", and less on {num_gpus} GPUs" if num_gpus else ""
    raise TargetError(
        f"transformers in {least} needs {(need.weights * _HOST_ROOM + need.text) / 1e9:.3g} GB for the self-test's "
        f"reference, {free / 1e9:.3g} GB are free on the host{gpus}: make it elsewhere (paceline doctor MODEL "
        "--save-reference FILE) and name it (target.selftest_reference), or do without (target.selftest = false)"
    )


def _itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _num_gpus(config: TargetConfig, device: torch.device, everywhere: bool) -> int:
    """From `device` on: the engine's, as far as that is known here. Of one with replicas, those of the first."""
    if device.type != "cuda":
        return 0
    num = config.tensor_parallel
    if everywhere or config.device_map is not None:
        num = torch.cuda.device_count()
    elif config.engine != "hf" and config.engine_url is None:
        num = max(num, num_shards(ENGINES[config.engine], config))
    return min(num, torch.cuda.device_count() - (device.index or 0))


def _on_gpus(needs: Mapping[str, _Need], device: torch.device, num: int) -> Place | None:
    """On one; else on all of them, where accelerate is there to spread a model."""
    first = device.index or 0
    free = free_on_gpus(range(first, first + num))
    for dtype, need in needs.items():
        room = {gpu: max(0, num_bytes - need.text) for gpu, num_bytes in free.items()}
        if need.weights * _GPU_ROOM < room[first]:
            return Place(device, dtype)
        if need.weights * _GPU_ROOM < sum(room.values()) and importlib.util.find_spec("accelerate") is not None:
            return Place(device, dtype, room)
    return None


def free_on_gpus(gpus: range) -> dict[int, int]:
    """Bytes of each, 0 of one that does not say.

    A process of its own asks, since asking takes some hundred MB of each until the process ends.
    """
    words = [sys.executable, "-c", _ASK, *map(str, gpus)]
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=True)  # noqa: S603
        return dict(zip(gpus, map(int, asked.stdout.split()), strict=True))
    except (subprocess.SubprocessError, ValueError) as error:
        logger.warning("free memory of GPUs %s is not known, the self-test's reference goes elsewhere: %s", gpus, error)
        return dict.fromkeys(gpus, 0)


def bytes_of_text(text_config: Any, texts: KnownTexts) -> int:
    """In fp32, of the longest text: attention's scores and their softmax, all layers' states, logits."""
    num_tokens = max(len(text.tokens) for text in texts.documents)
    scores = 3 * num_tokens * int(getattr(text_config, "num_attention_heads", None) or 0)
    states = int(text_config.num_hidden_layers) * int(text_config.hidden_size)
    return 4 * num_tokens * (scores + states + 2 * int(text_config.vocab_size))


def is_packed(checkpoint: Path) -> bool:
    """Whether transformers computes with packed weights, as they are stored, in whatever data type they want."""
    return read_quantization(checkpoint) is not None and not _is_unpacked(checkpoint)


def _is_unpacked(checkpoint: Path) -> bool:
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
