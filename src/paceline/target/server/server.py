"""The target server: an application on a thread of its own, beside the engine's."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import uvicorn
from starlette.types import ASGIApp

from paceline.errors import ConfigError, PacelineError, StoppedError, TargetError
from paceline.schema.features import Features
from paceline.schema.protocol import PROTOCOL_VERSION, HostFacts, ServerInfo, TransportName
from paceline.target.admission import Admission
from paceline.target.groups import RowGroups
from paceline.target.server.app import build_app
from paceline.target.server.connections import KEEP_ALIVE_S, BoundedConnection
from paceline.target.server.control import ControlCalls
from paceline.target.server.gate import check_address
from paceline.target.server.health import Health
from paceline.target.server.metrics import ServerMetrics
from paceline.target.server.rows import RowRoute
from paceline.target.server.session import EngineSide
from paceline.target.server.sessions import Sessions
from paceline.target.server.settings import ServerSettings
from paceline.target.server.weights import WeightRoute, WeightTables
from paceline.transport.negotiation import OpenSender
from paceline.version import VERSION

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_REPLIES_END_S = 2.0
"""Replies on their way out get so long when the server stops."""


@dataclass(frozen=True, slots=True)
class ServedTarget:
    """What a server serves."""

    admission: Admission
    device: torch.device
    """Where the engine leaves features."""
    weights: WeightTables
    tokenizer: Callable[[], Mapping[str, str]]
    """Text files by name; called each time somebody asks."""
    host: HostFacts
    senders: Mapping[TransportName, OpenSender]
    lossy: bool = False
    """Several rows share a forward."""


class TargetServer:
    """Serves one target to many sessions, from its construction on.

    consumes: connections      waits for: requests, on uvicorn's thread, which installs no signal handlers
    unblocked by: a request, stop()
    """

    def __init__(self, target: ServedTarget, settings: ServerSettings) -> None:
        """Bind the address and serve.

        Raises:
            ConfigError: an address that is taken, cannot be bound, or needs a token; a certificate that cannot be read.
        """
        check_address(settings)
        self.server_id = secrets.token_hex(16)
        self.health = Health()
        metrics = ServerMetrics()

        def on_captured(captured: Future[Features]) -> None:
            if captured.cancelled():
                return
            if (error := captured.exception()) is not None:
                self.health.row_failed(error)
            else:
                features = captured.result()
                metrics.row_computed(features.num_tokens, features.queued_s, features.computed_s)

        max_queued_rows = settings.most_unsent_rows * settings.max_sessions
        groups = RowGroups(target.admission, settings.kept, max_queued_rows, on_captured)
        engine = EngineSide(target.admission, groups, target.device, settings, on_captured, self.health.row_failed)
        self.sessions = Sessions(self.server_id, target.host, target.senders, engine, metrics.seconds_per_row)
        metrics.watch("paceline_sessions", "Open sessions", self.sessions.count)
        metrics.watch("paceline_queued_rows", "Rows that wait for a place with the engine", self.sessions.num_waiting)
        metrics.watch("paceline_kept_rows", "Rows kept for ranks that ask for their part later", groups.num_kept_rows)
        metrics.watch("paceline_kept_bytes", "Bytes of these rows", groups.num_kept_bytes)
        try:
            listening = _bind(settings.host, settings.port)
            self.port = int(listening.getsockname()[1])
            """The one it listens on."""
            self._uvicorn = _build_uvicorn(self._build_app(target, settings, metrics), settings)
            self._thread = threading.Thread(target=self._uvicorn.run, args=([listening],), name="http", daemon=True)
            self._thread.start()
            self._wait_until_started()
        except BaseException:
            self.sessions.close(StoppedError("the server did not start"))
            raise
        scheme = "http" if settings.tls_cert is None else "https"
        name = settings.advertise or settings.host
        self.url = f"{scheme}://{f'[{name}]' if ':' in name else name}:{self.port}"
        """Where clients find it."""

    def stop(self) -> None:
        """End: rows that wait are refused, replies on their way get two seconds. Safe to call twice."""
        failure = self.health.failure
        self.health.stop()
        reason: PacelineError = StoppedError("this server is stopping: ask another")
        if failure is not None:
            reason = TargetError(f"the target engine is dead: {failure}")
        self.sessions.close(reason)
        self._uvicorn.should_exit = True
        self._thread.join(_REPLIES_END_S + 2.0)
        if self._thread.is_alive():
            logger.warning("the HTTP thread has not ended after %g s", _REPLIES_END_S + 2.0)

    def _build_app(self, target: ServedTarget, settings: ServerSettings, metrics: ServerMetrics) -> ASGIApp:
        info, limits = target.admission.info(), target.admission.limits()
        server_info = ServerInfo(
            protocol=PROTOCOL_VERSION,
            server_id=self.server_id,
            paceline=VERSION,
            target=info,
            host=target.host,
            transports=tuple(target.senders),
            max_row_tokens=settings.max_row_tokens,
            max_document_tokens=limits.max_document_tokens,
            capture_layers=limits.layers,
            lossy=target.lossy,
        )
        control = ControlCalls(server_info, target.tokenizer, self.sessions, settings, self.health, metrics)
        rows = RowRoute(self.sessions, settings, info.num_position_axes, metrics, self.health.check_serving)
        return build_app(control, rows, WeightRoute(target.weights, info.dtype, settings))

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise TargetError(f"the HTTP server did not start within {_START_TIMEOUT_S:g} s: see the log")
            time.sleep(0.005)


def _build_uvicorn(app: ASGIApp, settings: ServerSettings) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(KEEP_ALIVE_S),
        timeout_graceful_shutdown=int(_REPLIES_END_S),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"--tls-cert {settings.tls_cert} and --tls-key {settings.tls_key}: {error}") from error
    return uvicorn.Server(config)


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from error
