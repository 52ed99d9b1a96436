"""The self-test of an engine: its reference computed beforehand, the comparison, the verdict."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.config.target import TargetConfig
from paceline.errors import TargetError
from paceline.launch.reference import find_reference
from paceline.launch.reference_place import bytes_of_text, find_place, is_packed
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
from paceline.target.opening import ENGINES, ServedEngine
from paceline.target.selftest.reference import Reference, cache_path, load_reference, observe
from paceline.target.selftest.run import SelfTestResult, run_selftest
from paceline.target.selftest.texts import KnownTexts, build_texts, num_far_captures
from paceline.target.selftest.tolerance import Tolerance, choose_tolerance

_NUM_LAYERS = 6
"""Compared of an engine that captures any."""
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
    if config.engine != "hf":
        return ENGINES[config.engine].title
    return "transformers (hf)" + (f" on {config.tensor_parallel} processes" if config.tensor_parallel > 1 else "")


def has_whole_model(config: TargetConfig) -> bool:
    """Whether this process will hold a model of transformers that `observe_own` can ask; others hold a share of one."""
    return config.engine == "hf" and config.tensor_parallel == 1


def prepare_selftest(
    config: TargetConfig, stop: threading.Event | None = None, anew: bool = False, exact: bool = False
) -> SelfTest:
    """Compute the reference, in a process of its own that is over when this returns, unless it is known.

    Args:
        anew: neither a file of the configuration nor one of an earlier time will do; on all GPUs that are visible.
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
        if given.dtype == "float32" or not exact:
            return SelfTest(texts, given.for_engine(own_dtype), tolerance)
    if quantization and importlib.util.find_spec("accelerate") is None:
        raise TargetError(
            f"transformers cannot load {config.model!r}, which is quantised, without accelerate: "
            'pip install "paceline[accelerate]", or name a reference made elsewhere (target.selftest_reference)'
        )
    packed = is_packed(checkpoint)
    best = "auto" if packed else "float32"
    kept = [_cache_path(fingerprint, dtype, own_dtype, texts) for dtype in ([best] if exact else [best, own_dtype])]

    def plan() -> tuple[Path, dict[str, Any]]:
        place = find_place(checkpoint, config, bytes_of_text(text_config, texts), exact, everywhere=anew)
        return _cache_path(fingerprint, place.dtype, own_dtype, texts), {
            "model": str(checkpoint),
            "dtype": place.dtype,
            "rounded_dtype": own_dtype if place.dtype == "float32" != own_dtype else None,
            "device": str(place.device),
            "spread": place.spread,
            "trust_remote_code": config.trust_remote_code,
            "quantised": quantization is not None,
            "unpacked": quantization is not None and not packed,
            "num_tokenizer_tokens": count_tokenizer_tokens(tokenizer),
            "num_positions": num_positions,
            "fingerprint": fingerprint,
        }

    reference = find_reference(kept, texts, fingerprint, plan, config.engine_start_timeout_s, stop, anew)
    return SelfTest(texts, reference.for_engine(own_dtype), tolerance)


def compare(
    config: TargetConfig, engine: ServedEngine, test: SelfTest | None, stop: threading.Event | None = None
) -> SelfTestResult:
    """Hold an engine against transformers; what may be rounding alone is told from a fault by float32.

    Args:
        test: made beforehand; None takes the model that `engine` has loaded.

    Raises:
        TargetError: whether it is rounding cannot be told here.
        StoppedError: `stop` was set.
    """
    if test is None:
        assert isinstance(engine, HFEngine), "other engines have a reference that was made beforehand"
        test = observe_own(config, engine)
    result = test.run(config, engine, stop)
    if result.problem is None or not _may_be_rounding(config, test, result):
        return result
    dtype = test.reference.dtype
    logger.warning("beside transformers in %s: %s; float32 tells how much of that is rounding", dtype, result.problem)
    try:
        test = prepare_selftest(config, stop, exact=True)
    except TargetError as error:
        raise TargetError(
            f"{engine_name(config)} does not compute this target as transformers in {dtype} does: {result.problem}; "
            f"whether that is rounding alone cannot be told: {error}"
        ) from error
    return test.run(config, engine, stop)


def _cache_path(fingerprint: str, dtype: str, own_dtype: str, texts: KnownTexts) -> Path:
    """Of a reference in `dtype`, with the rounding of `own_dtype` where it is exact enough to tell that."""
    return cache_path(fingerprint, dtype, own_dtype if dtype == "float32" != own_dtype else None, texts)


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


def _may_be_rounding(config: TargetConfig, test: SelfTest, result: SelfTestResult) -> bool:
    """Whether float32 might say otherwise: it was not asked, and no error is larger than rounding is ever allowed."""
    if test.reference.dtype == "float32":
        return False
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    return not is_packed(checkpoint) and all(line.relative <= test.tolerance.widest for line in result.lines)


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
