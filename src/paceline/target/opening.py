"""The engine that `[target]` names, started or reached, until a block ends."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from paceline.config.target import TargetConfig
from paceline.errors import ConfigError, TargetError, TransportError
from paceline.target.engines.document_engine import DocumentEngine
from paceline.target.engines.heartbeat import Heartbeat
from paceline.target.engines.http_calls import ENGINE_KEY
from paceline.target.engines.interface import EngineAddress, EngineKind
from paceline.target.engines.outer_parts import load_outer_parts
from paceline.target.engines.programs import EngineProgram, check_spread, find_program, visible_gpus
from paceline.target.engines.starting import is_ready, start_engine
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.loading import load_config, resolve_checkpoint, resolve_device
from paceline.target.hf.parallel import check_parallel
from paceline.target.interface import Engine, OnLost
from paceline.target.sglang.kind import SGLANG
from paceline.target.vllm.kind import VLLM

ENGINES: dict[str, EngineKind] = {"vllm": VLLM, "sglang": SGLANG}
"""By `target.engine`; "hf" is no server."""
_OF_TRANSFORMERS = ("attention", "compile", "device_map", "documents")
logger = logging.getLogger(__name__)


class ServedEngine(Engine, Protocol):
    """An engine with what a server tells of it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""

    def on_lost(self, call: OnLost) -> None:
        """Call `call` with the reason once the engine can compute no more; at once if it cannot already."""


def check_engine(config: TargetConfig) -> None:
    """Raise what settings, or an engine that runs already, can say before anything slow is begun.

    Raises:
        ConfigError, TargetError, TransportError: as `open_engine`.
    """
    if config.engine != "hf":
        _check_settings(config)
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    if config.engine == "hf":
        if config.tensor_parallel > 1:
            check_parallel(config, checkpoint, resolve_device(config.device))
        return
    kind, layers = ENGINES[config.engine], _layers_of(config, checkpoint)
    if config.engine_url is not None:
        kind.connect(_address_of(config, layers)).close()
        return
    program = find_program(config, kind.packages, kind.install)
    check_spread(config, kind.spreading, kind.title)
    visible_gpus(config, os.environ)
    kind.command(config, program, checkpoint, EngineAddress("http://127.0.0.1:0", Path(), layers))


@contextlib.contextmanager
def open_engine(config: TargetConfig, stop: threading.Event | None = None) -> Iterator[ServedEngine]:
    """The engine, ready.

    Args:
        config: with `capture_layers`, for engines that must know them when they start.
        stop: ends waiting for an engine that starts.

    Raises:
        ConfigError: settings that cannot work with this engine, or it is not installed.
        TargetError: the target cannot be loaded or described, or the engine ended while it started. Of an engine
            that was started here, a TransportError inside the block becomes one, with the last lines of its log.
        StoppedError: `stop` was set.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)  # of this process and of all threads that begin after this
    if config.engine == "hf":
        engine = HFEngine(config)
        with contextlib.closing(engine):
            yield engine
        return
    kind = ENGINES[config.engine]
    _check_settings(config)
    checkpoint = resolve_checkpoint(config.model, config.revision, config.trust_remote_code)
    layers = _layers_of(config, checkpoint)
    if config.engine_url is not None:
        with _reach(kind, config, layers) as reached:
            yield reached
        return
    program = find_program(config, kind.packages, kind.install)
    with _start(kind, config, program, checkpoint, layers, stop) as started:
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
    if not config.capture_layers:
        raise ConfigError(f'target.engine = "{config.engine}" needs target.capture_layers when it starts')


def _layers_of(config: TargetConfig, checkpoint: Path) -> tuple[int, ...]:
    """Those that an engine other than "hf" captures."""
    assert config.capture_layers is not None, "the caller looked"
    num_layers = int(load_config(checkpoint, config.trust_remote_code).get_text_config(decoder=True).num_hidden_layers)
    return engine_layers(config.capture_layers, num_layers)


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
def _start(
    kind: EngineKind,
    config: TargetConfig,
    program: EngineProgram,
    checkpoint: Path,
    layers: tuple[int, ...],
    stop: threading.Event | None,
) -> Iterator[DocumentEngine]:
    if program.version not in kind.tried:
        logger.warning(
            "%s %s was not tried with this version of paceline (tried: %s): the self-test decides whether it works",
            kind.title,
            program.version,
            ", ".join(kind.tried),
        )
    process, address = start_engine(kind, config, program, checkpoint, layers)
    with contextlib.closing(process):
        outer = load_outer_parts(config)  # while the engine starts
        process.wait_until(lambda: is_ready(kind, address), config.engine_start_timeout_s, stop)
        try:
            engine = DocumentEngine(config, kind.connect(address), outer)
        except (TransportError, TargetError) as error:
            raise process.explain(error) from error
        with contextlib.closing(engine):
            process.on_end(engine.lose)
            try:
                yield engine
            except TransportError as error:  # of the self-test: what a server computes later fails its row alone
                raise process.explain(error) from error


def _address_of(config: TargetConfig, layers: tuple[int, ...]) -> EngineAddress:
    """Of an engine that runs already."""
    assert config.engine_url is not None, "the caller looked"
    directory = Path(str(config.engine_directory))
    if not directory.is_dir():
        raise ConfigError(
            f"target.engine_directory = {str(directory)!r} is no directory on this host: it must be the one that the "
            "engine writes to"
        )
    return EngineAddress(config.engine_url, directory, layers, os.environ.get(ENGINE_KEY, ""))


@contextlib.contextmanager
def _reach(kind: EngineKind, config: TargetConfig, layers: tuple[int, ...]) -> Iterator[DocumentEngine]:
    server = kind.connect(_address_of(config, layers))
    with (
        contextlib.closing(server),
        contextlib.closing(DocumentEngine(config, server, load_outer_parts(config))) as engine,
        contextlib.closing(Heartbeat(server.name, server.is_alive, engine.lose)),
    ):
        yield engine
