"""Placements: what `placement.target` says -> the target's facts, its weights, and the servers a pool is made of."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from paceline.client.calls import ServerCalls
from paceline.client.checks import check_target
from paceline.client.connection import LocalConnection
from paceline.client.recorded import PartialConnection, RecordedConnection, RecordingBeside
from paceline.client.recorded_weights import RecordedWeights
from paceline.client.recording import Recording
from paceline.client.remote import RemoteConnection
from paceline.client.server_list import FixedServers, ServerList, ServersFile, write_servers
from paceline.client.weights import RemoteWeights
from paceline.config.files import write_whole
from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.drafts.interface import TargetWeights
from paceline.errors import ConfigError, ServerLostError, StoppedError
from paceline.launch.target_facts import TargetFacts, open_recording, read_checkpoint_facts, recorded_facts
from paceline.launch.tokens import take_token
from paceline.schema.protocol import ServerInfo
from paceline.schema.target_info import TargetInfo
from paceline.target.admission import Admission
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.loading import load_tokenizer
from paceline.target.hf.weights import CheckpointWeights
from paceline.transport.buffers import HostBuffers
from paceline.transport.local import LocalReceiver, LocalSender

FROM_SERVER = "server"
"""`data.tokenizer` = this: the tokenizer comes from the target's server."""
_LOOK_EVERY_S = 0.2
_LOG_EVERY_S = 30.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """A target within reach of a trainer."""

    info: TargetInfo
    weights: TargetWeights
    """On the trainer's device, in its dtype."""
    servers: ServerList
    recording: Recording | None = None
    """What rows come from that it has."""


class RemoteAccess:
    """How this process reaches the servers of a run: where they are named, and with which credentials."""

    def __init__(self, config: RunConfig, token: str | None, stop: threading.Event, rank: int = 0) -> None:
        """Reach nothing yet.

        Args:
            token: of the servers; None where they ask for none.
            stop: ends waiting for servers.
            rank: of this trainer, for the servers' logs.
        """
        self._config = config
        self._rank = rank
        self._token = token
        self._stop = stop
        self._path = RunDir(Path(config.run_dir)).servers

    def servers(self, device: torch.device) -> ServersFile:
        """What a pool is made of; its connections bring rows to `device`, through host memory that they share."""
        buffers = HostBuffers(self._config.transport.prefetch_bytes, pinned=device.type == "cuda")
        return ServersFile(self._path, partial(self._connect, device, buffers))

    def calls(self) -> ServerCalls:
        """Control calls to a server that answers now; waits until there is one, with a log line every 30 s.

        Raises:
            ServerLostError: none did in time; names the last error of each.
            StoppedError: the run was asked to stop.
        """
        listed = self.servers(torch.device("cpu"))
        config, begin = self._config, time.monotonic()
        starting = config.placement.target == "servers"
        limit_s = config.placement.start_timeout_s if starting else config.pool.all_down_timeout_s
        next_log = begin + _LOG_EVERY_S
        while True:
            reasons = []
            for url in sorted(listed.read()):
                calls = self._calls(url)
                try:
                    calls.info()
                except ServerLostError as error:
                    calls.close()
                    reasons.append(str(error))
                else:
                    return calls
            waited_s = time.monotonic() - begin
            missing = "; ".join(reasons) or f"{self._path} names none yet"
            if waited_s > limit_s:
                raise ServerLostError(f"no server answered within {limit_s:.0f} s: {missing}")
            if time.monotonic() >= next_log:
                logger.warning("waiting %.0f s for a server: %s", waited_s, missing)
                next_log += _LOG_EVERY_S
            if self._stop.wait(_LOOK_EVERY_S):
                raise StoppedError("the run was asked to stop while it waited for a server")

    def info(self) -> ServerInfo:
        """What the first server that answers says about its target; errors as `calls`."""
        with contextlib.closing(self.calls()) as calls:
            return calls.info()

    def facts(self) -> TargetFacts:
        """What preparing data needs, from a server; its tokenizer's files are kept in the run directory."""
        directory = RunDir(Path(self._config.run_dir)).tokenizer
        with contextlib.closing(self.calls()) as calls:
            info = calls.info().target
            files = calls.tokenizer()
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(directory / name, text)  # ranks may do it at once
        return TargetFacts(info.vocab_size, info.mask_token_id, load_tokenizer(str(directory)))

    def _calls(self, url: str) -> ServerCalls:
        config = self._config
        return ServerCalls(url, config.transport, config.pool, token=self._token, tls_ca=config.placement.tls_ca)

    def _connect(self, device: torch.device, buffers: HostBuffers, url: str) -> RemoteConnection:
        config = self._config
        return RemoteConnection(
            url,
            config.transport,
            config.pool,
            device,
            token=self._token,
            tls_ca=config.placement.tls_ca,
            label=f"{Path(config.run_dir).name} trainer-{self._rank}",
            buffers=buffers,
        )


def open_access(
    config: RunConfig, stop: threading.Event, token_file: Path | None = None, rank: int = 0
) -> RemoteAccess | None:
    """Access to the run's servers, with the token of `token_file` or of the placement; None without servers.

    For `urls` it also writes servers.json where there is none: the list that others may then replace.

    Raises:
        ConfigError: a token file that cannot be used.
    """
    placement = config.placement
    if placement.target not in ("servers", "urls"):
        return None
    if placement.target == "urls" and not RunDir(Path(config.run_dir)).servers.exists():
        publish_urls(config)
    return RemoteAccess(config, take_token(token_file or placement.token_file), stop, rank)


def publish_urls(config: RunConfig) -> None:
    """Write servers.json as the configuration has it: what a training begins with."""
    write_servers(RunDir(Path(config.run_dir)).servers, config.placement.urls)


def target_facts(config: RunConfig, access: RemoteAccess | None) -> TargetFacts:
    """What preparing data needs of the target: from a recording or a server where the run has one, else from its files.

    Raises:
        ConfigError: data.tokenizer = "server" without servers.
    """
    if config.placement.target == "recorded":
        return recorded_facts(config)
    if config.data.tokenizer == FROM_SERVER and access is None:
        raise ConfigError(
            f'data.tokenizer = "server" with placement.target = "{config.placement.target}": name a directory or a hub '
            "id, or leave it out for the target's own"
        )
    elsewhere = config.placement.target == "urls" and not Path(config.target.model).expanduser().is_dir()
    if access is not None and (elsewhere or config.data.tokenizer == FROM_SERVER):
        return access.facts()
    return read_checkpoint_facts(config)


@contextlib.contextmanager
def open_target(
    config: RunConfig, device: torch.device, dtype: torch.dtype, access: RemoteAccess | None
) -> Iterator[OpenTarget]:
    """The target where the placement says it is, until the block ends; servers elsewhere are not ended with it.

    Raises:
        HandshakeError: the recording beside it is of another target.
        DataError: the recording cannot be used.
    """
    if config.placement.target == "recorded":
        yield _open_recorded(config, device, dtype)
    elif access is None:
        with _open_inline(config, device, dtype) as target:
            yield _with_recording(config, device, target)
    else:
        yield _with_recording(config, device, _open_remote(config, device, dtype, access))


def _open_recorded(config: RunConfig, device: torch.device, dtype: torch.dtype) -> OpenTarget:
    recording = open_recording(config)
    connect = partial(RecordedConnection, recording, _buffers(config, device), device)
    weights = RecordedWeights(recording.paths.weights, device, dtype)
    return OpenTarget(recording.info, weights, FixedServers({recording.name: connect}), recording)


def _with_recording(config: RunConfig, device: torch.device, target: OpenTarget) -> OpenTarget:
    """`target`, with the recording of `data.recorded` beside it."""
    if config.data.recorded is None:
        return target
    recording = Recording(config.data.recorded)
    check_target(recording.name, recording.info, target.info)
    for problem in recording.forget_missing():
        logger.warning("%s; these rows are asked of the target", problem)
    connect = partial(PartialConnection, recording, _buffers(config, device), device)
    return replace(target, servers=RecordingBeside(target.servers, recording, connect), recording=recording)


def _buffers(config: RunConfig, device: torch.device) -> HostBuffers:
    return HostBuffers(config.transport.prefetch_bytes, pinned=device.type == "cuda")


def _open_remote(config: RunConfig, device: torch.device, dtype: torch.dtype, access: RemoteAccess) -> OpenTarget:
    info = access.info()
    logger.info("target %s on servers named in %s", info.target.name, RunDir(Path(config.run_dir)).servers)
    weights = RemoteWeights(access.calls, info.target, device, dtype)
    return OpenTarget(info.target, weights, access.servers(device))


@contextlib.contextmanager
def _open_inline(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Iterator[OpenTarget]:
    """A pool's only server, in this process: the engine on a thread of its own, behind admission like any other."""
    engine = HFEngine(config.target)
    try:
        # Whatever the stream may ask for at once is taken: it is the only client.
        admission = Admission(engine, max_queued_rows=max(64, config.transport.prefetch_rows))
        try:
            connection = LocalConnection(admission, LocalSender(), LocalReceiver(device))
            weights = CheckpointWeights(config.target, device, dtype)
            yield OpenTarget(engine.info(), weights, FixedServers({connection.name: lambda: connection}))
        finally:
            admission.close()
    finally:
        engine.close()
