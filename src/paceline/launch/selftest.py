"""The self-test of an engine: its reference computed beforehand, the comparison, the verdict."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.memory import free_memory
from paceline.launch.reference import find_reference
from paceline.target.engines.flags import option_name
from paceline.target.engines.steps import is_known, step_tokens
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.fingerprint import fingerprint_weights
from paceline.target.hf.info import count_tokenizer_tokens
from paceline.target.hf.loading import (
    EXPERT_COUNTS,
    load_config,
    load_tokenizer,
    read_quantization,
    resolve_checkpoint,
    resolve_device,
    resolve_dtype,
)
from paceline.target.hf.stored_tensors import read_tensor_table
from paceline.target.opening import ENGINES, ServedEngine
from paceline.target.selftest.reference import Reference, cache_path, load_reference, observe
from paceline.target.selftest.run import SelfTestResult, run_selftest
from paceline.target.selftest.texts import KnownTexts, build_texts, num_far_captures
from paceline.target.selftest.tolerance import Tolerance, choose_tolerance

_NUM_LAYERS = 6
"""Compared of an engine that captures any."""
_BLOCK_SCALES = ".weight_scale_inv"
"""Names of the scales of weights in blocks end so."""
_ROOM = 1.3
"""A model takes so many times its weights while it computes a text."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What an engine will be held against."""

    texts: KnownTexts
    reference: Reference
    tolerance: Tolerance

    def run(self, config: TargetConfig, engine: ServedEngine, stop: threading.Event | None = None) -> SelfTestResult:
        """Compare; the verdict is the result's `check`.

        Raises:
            StoppedError: `stop` was set.
        """
        layers = config.capture_layers or _spread(engine.info().num_layers)
        num_far, unproven = _far_captures(config)
        result = run_selftest(
            engine, self.texts, self.reference, sorted(set(layers)), self.tolerance, num_far, unproven, stop
        )
        name = engine_name(config)
        for line in (f"self-test of {name} on {len(self.texts.tokens)} tokens:", *result.describe()):
            logger.info(line)
        return result


def engine_name(config: TargetConfig) -> str:
    """For messages."""
    return "transformers (hf)" if config.engine == "hf" else ENGINES[config.engine].title


def prepare_selftest(
    config: TargetConfig, stop: threading.Event | None = None, anew: bool = False, exact: bool = False
) -> SelfTest:
    """Compute the reference, in a process of its own that is over when this returns, unless it is known.

    Args:
        anew: neither a file of the configuration nor one of an earlier time will do.
        exact: in float32, with the rounding of the target's own data type, or not at all.

    Raises:
        TargetError: transformers cannot compute it here.
        StoppedError: `stop` was set.
    """
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    tokenizer = load_tokenizer(str(checkpoint), None, config.trust_remote_code)
    text_config = load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True)
    num_positions = int(getattr(text_config, "max_position_embeddings", None) or 0)
    texts = build_texts(count_tokenizer_tokens(tokenizer), num_positions)
    tolerance = _tolerance(config, checkpoint)
    fingerprint = fingerprint_weights(checkpoint)
    own_dtype, quantization = resolve_dtype(config, checkpoint), read_quantization(checkpoint)
    if config.selftest_reference is not None and not anew:
        # Of a quantised target it may be that of the weights it was made from.
        wanted = None if quantization else fingerprint
        given = load_reference(Path(config.selftest_reference), wanted, texts)
        if given.fingerprint != fingerprint:
            logger.warning("the self-test compares with other weights: those of %s", given.model)
        return SelfTest(texts, given.for_engine(own_dtype), tolerance)
    if quantization and importlib.util.find_spec("accelerate") is None:
        raise TargetError(
            f"transformers cannot load {config.model!r}, which is quantised, without accelerate: "
            'pip install "paceline[accelerate]", or name a reference made elsewhere (target.selftest_reference)'
        )
    device, dtype = _where_it_fits(checkpoint, config, _bytes_of_text(text_config, texts), exact)
    rounded_dtype = own_dtype if dtype == "float32" != own_dtype else None
    kept = cache_path(fingerprint, dtype, rounded_dtype, texts)
    settings = {
        "model": str(checkpoint),
        "dtype": dtype,
        "rounded_dtype": rounded_dtype,
        "device": str(device),
        "trust_remote_code": config.trust_remote_code,
        "quantised": quantization is not None,
        "unpacked": _is_unpacked(checkpoint),
        "num_tokenizer_tokens": count_tokenizer_tokens(tokenizer),
        "num_positions": num_positions,
        "fingerprint": fingerprint,
    }
    reference = find_reference(kept, texts, settings, config.engine_start_timeout_s, stop, anew)
    return SelfTest(texts, reference.for_engine(own_dtype), tolerance)


def _far_captures(config: TargetConfig) -> tuple[int, str | None]:
    """How often the far text is asked for, and what that does not prove."""
    if config.engine == "hf":
        return 1, None
    kind = ENGINES[config.engine]
    step = step_tokens(kind, config, resolve_device(config.device).type == "cuda")
    num_far, is_more = num_far_captures(step)
    if not is_more:
        return num_far, f"not compared, for want of tokens: steps of {step:,} tokens, and their chunks"
    if not is_known(kind, config):
        option = f"target.engine_args.{kind.step_options[0]}"
        return num_far, f"not known: whether the engine's steps are of more than {step:,} tokens ({option} can say it)"
    return num_far, None


def observe_own(config: TargetConfig, engine: HFEngine) -> SelfTest:
    """The reference of an engine that is transformers, from the model that it has loaded; without the far text.

    Such an engine computes a document in one forward, as the reference does, and this is done at each start.
    """
    info = engine.info()
    texts = build_texts(info.num_tokenizer_tokens)
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    reference = observe(engine.model, texts, info.weight_fingerprint)
    return SelfTest(texts, reference, _tolerance(config, checkpoint))


def _bytes_of_text(text_config: Any, texts: KnownTexts) -> int:
    """In fp32, of the longest text: attention's scores and their softmax, all layers' states, logits."""
    num_tokens = max(len(text.tokens) for text in texts.documents)
    scores = 3 * num_tokens * int(getattr(text_config, "num_attention_heads", None) or 0)
    states = int(text_config.num_hidden_layers) * int(text_config.hidden_size)
    return 4 * num_tokens * (scores + states + 2 * int(text_config.vocab_size))


def may_be_rounding(config: TargetConfig) -> bool:
    """Whether transformers, compared with itself in the target's data type, may be too far off because of that."""
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    return read_quantization(checkpoint) is None and resolve_dtype(config, checkpoint) != "float32"


def _where_it_fits(
    checkpoint: Path, config: TargetConfig, text_bytes: int, exact: bool = False
) -> tuple[torch.device, str]:
    """(device, dtype) of the reference: fp32 where there is room, since bf16 of transformers is itself 1 to 2 % off.

    Raises:
        TargetError: it must be `exact`, and there is room nowhere.
    """
    device, dtype = resolve_device(config.device), str(config.dtype)
    quantization = read_quantization(checkpoint)
    if quantization is not None:
        if not _is_unpacked(checkpoint):
            return device, "auto"  # it may need the device's kernels
        dtype = resolve_dtype(config, checkpoint)
    table = read_tensor_table(checkpoint).values()
    num_weights = sum(math.prod(tensor.shape) for tensor in table)
    num_bytes = sum(tensor.num_bytes for tensor in table) if quantization is None else 2 * num_weights
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if 4 * num_weights * _ROOM + text_bytes < free:
            return device, "float32"
        if not exact and num_bytes * _ROOM + text_bytes < free:
            return device, dtype
    needed, free = 4 * num_weights * _ROOM + text_bytes, free_memory()
    if needed < free:
        return torch.device("cpu"), "float32"
    if exact:
        raise TargetError(
            f"transformers in float32 needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free on the host: make the "
            "reference elsewhere (paceline doctor MODEL --save-reference FILE) and name it (target.selftest_reference)"
        )
    return torch.device("cpu"), dtype


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


def _tolerance(config: TargetConfig, checkpoint: Path) -> Tolerance:
    whole = load_config(checkpoint, config.trust_remote_code)
    text = whole.get_text_config(decoder=True)
    experts = any((getattr(text, name, None) or 0) > 1 for name in EXPERT_COUNTS)
    return choose_tolerance(resolve_dtype(config, checkpoint), _quantization(config, checkpoint), experts)


def _quantization(config: TargetConfig, checkpoint: Path) -> Mapping[str, Any] | str | None:
    """The checkpoint's, or what the engine is asked to quantise to while it loads."""
    asked = {option_name(name): value for name, value in config.engine_args.items()}
    format_ = asked.get("quantization") or asked.get("-q")
    return read_quantization(checkpoint) or (str(format_) if format_ else None)


def _spread(num_layers: int) -> tuple[int, ...]:
    """Layers from the first to the last but one."""
    last = max(0, num_layers - 2)
    return tuple(sorted({round(last * step / (_NUM_LAYERS - 1)) for step in range(_NUM_LAYERS)}))
