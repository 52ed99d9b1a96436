"""`paceline serve`: one target server, from its start to a signal, its engine's death, or a long time without work."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from rich.console import Console

from paceline.config.files import write_whole
from paceline.config.target import TargetConfig
from paceline.errors import ConfigError
from paceline.launch.selftest import SelfTest, compare, engine_name, has_whole_model, prepare_selftest
from paceline.launch.target_facts import default_layers
from paceline.observe.logs import logging_for
from paceline.schema.protocol import TransportName
from paceline.target.admission import Admission
from paceline.target.hf.loading import resolve_device
from paceline.target.hf.merging import MergingEngine
from paceline.target.hf.tables import CheckpointTables
from paceline.target.hf.tokenizer_files import TokenizerFiles
from paceline.target.hf.weights import CheckpointWeights
from paceline.target.interface import Engine
from paceline.target.opening import ServedEngine, check_engine, open_engine
from paceline.target.server.gate import check_address
from paceline.target.server.server import ServedTarget, TargetServer
from paceline.target.server.settings import ServerSettings
from paceline.transport.buffers import HostBuffers
from paceline.transport.file import FileSenders
from paceline.transport.http import HttpSender
from paceline.transport.negotiation import OpenedSender, OpenSender, SenderRequest, host_facts
from paceline.transport.p2p.opening import P2PSenders, p2p_kinds

if TYPE_CHECKING:
    from paceline.launch.signals import StopSignals

_LOOK_EVERY_S = 0.1
_GRACE_S = 8.0
_KEPT_BYTES = 4 << 30
"""Pinned memory for replies that is kept from row to row."""
_NUM_FILES = 65_536
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a server process does besides serving."""

    auto_exit_s: float | None = None
    """Seconds without any session after which it ends."""
    ready_file: Path | None = None
    """Gets {"url", "pid"} when the server is ready."""
    log_file: Path | None = None
    """None logs to stderr."""
    log_level: str = "INFO"
    rows_per_forward: int = 1
    """More than 1 is lossy: features depend in the last bits on what else is asked for."""


def serve_target(
    config: TargetConfig,
    settings: ServerSettings,
    options: ServeOptions,
    signals: StopSignals,
    announce: Callable[[str], None],
) -> None:
    """Serve until a signal comes, or until nobody has used the server for `options.auto_exit_s`.

    Args:
        announce: gets one line with the URL when the server is ready.

    Raises:
        PacelineError: the target or the address cannot be used. An engine that dies later ends the process.
    """
    check_address(settings)
    _check_merging(config, options)
    signals.grace_s = 1.0  # nothing to end in order while the target loads
    level = logging.getLevelNamesMapping()[options.log_level]
    console = Console(stderr=True, markup=False) if options.log_file is None else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_for("server", 0, options.log_file, console, level))
        _allow_many_files()
        config = with_capture_layers(config)
        check_engine(config)
        # Before the engine starts: a GPU may not hold two models.
        test = prepare_selftest(config, signals.stop) if config.selftest and not has_whole_model(config) else None
        engine = stack.enter_context(open_engine(config, signals.stop))
        _prove(config, engine, test, signals.stop)
        signals.grace_s = _GRACE_S
        admission = Admission(_merging(engine, options), settings.most_unsent_rows, settings.max_sessions)
        stack.callback(admission.close)
        server = TargetServer(_served(config, options, settings, engine, admission), settings)
        stack.callback(server.stop)
        engine.on_lost(server.health.engine_died)
        announce(f"{config.model} is served at {server.url}")
        if options.ready_file is not None:
            _write_ready(options.ready_file, server.url)
        _wait(server, options, signals)
        if server.health.failure is not None:
            _end_now(server)


def _check_merging(config: TargetConfig, options: ServeOptions) -> None:
    if options.rows_per_forward > 1 and config.engine != "hf":
        raise ConfigError(
            f'--rows-per-forward {options.rows_per_forward} for target.engine = "{config.engine}", which puts the '
            "documents of rows together by itself (target.engine_documents, target.engine_tokens): leave it out"
        )


def with_capture_layers(config: TargetConfig) -> TargetConfig:
    """`config` for an engine that must know when it starts which layers it will be asked for."""
    if config.engine == "hf" or config.capture_layers is not None:
        return config
    layers = default_layers(config)
    logger.info("target.capture_layers is not set: layers %s, which all algorithms read by default", list(layers))
    return config.model_copy(update={"capture_layers": layers})


def _prove(config: TargetConfig, engine: ServedEngine, test: SelfTest | None, stop: threading.Event) -> None:
    """Raise TargetError unless the engine computes what transformers does."""
    if config.selftest:
        compare(config, engine, test, stop).check(engine_name(config))
    else:
        logger.warning("target.selftest = false: nobody has looked whether %s computes this target", config.engine)


def _merging(engine: ServedEngine, options: ServeOptions) -> Engine:
    return engine if options.rows_per_forward == 1 else MergingEngine(engine, options.rows_per_forward)


def _served(
    config: TargetConfig, options: ServeOptions, settings: ServerSettings, engine: ServedEngine, admission: Admission
) -> ServedTarget:
    device = resolve_device(config.device)
    # read in slices, whatever device and dtype the engine computes in
    weights = CheckpointWeights(config, torch.device("cpu"), torch.float32)
    return ServedTarget(
        admission=admission,
        device=device,
        weights=CheckpointTables(weights),
        tokenizer=TokenizerFiles(engine.tokenizer),
        host=host_facts(device),
        senders=_senders(device, settings),
        lossy=options.rows_per_forward > 1,
    )


def _senders(device: torch.device, settings: ServerSettings) -> Mapping[TransportName, OpenSender]:
    """The transports of this server; those that listen or write do so only once a session asks for them."""
    buffers = HostBuffers(_KEPT_BYTES, pinned=device.type == "cuda")

    def open_http(request: SenderRequest) -> OpenedSender:
        del request
        return OpenedSender(HttpSender(buffers), {})

    senders: dict[TransportName, OpenSender] = {"http": open_http, "file": FileSenders(buffers)}
    for kind in p2p_kinds(device):
        senders[kind] = P2PSenders(kind, buffers, settings.advertise, max_unsent_bytes=settings.max_unsent_bytes)
    return senders


def _wait(server: TargetServer, options: ServeOptions, signals: StopSignals) -> None:
    while not signals.stop.wait(_LOOK_EVERY_S):
        if server.health.failure is not None:
            return
        if options.auto_exit_s is not None and server.sessions.idle_s() > options.auto_exit_s:
            logger.info("no session for %g s (--auto-exit-s): ending", options.auto_exit_s)
            return


def _end_now(server: TargetServer) -> NoReturn:
    """Tell those who wait, and end: a thread may be inside a collective or a kernel for ever."""
    failure = server.health.failure
    server.stop()
    logger.critical("ending, since the target engine is dead: %s: %s", type(failure).__name__, failure)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(1)


def _write_ready(path: Path, url: str) -> None:
    write_whole(path, json.dumps({"url": url, "pid": os.getpid()}) + "\n")


def _allow_many_files() -> None:
    """One for each connection; the usual 1024 are soon used up by many sessions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _NUM_FILES if hard == resource.RLIM_INFINITY else min(hard, _NUM_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
