"""What every request passes: host name, token, and the account of it in log and metrics."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
import time

from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.errors import ConfigError
from paceline.target.server.access_log import log_request
from paceline.target.server.answers import Refusal, refuse
from paceline.target.server.bodies import ClientGoneError
from paceline.target.server.metrics import ServerMetrics
from paceline.target.server.settings import ServerSettings

_OPEN_TO_ALL = "/healthz"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+)(?::(\d{1,5}))?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_MAX_TOKEN_BYTES = 4096
CLIENT_LEFT = 499
"""Status in log and metrics of a client that left before it was answered."""


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can connect to a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(settings: ServerSettings) -> None:
    """Raise ConfigError for an address that others reach without a token, or half a certificate."""
    if settings.token is None and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} is reached from other machines, and there is no token: write one into a file "
            "(mode 0600) and name it with --token-file, or set PACELINE_TOKEN"
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")


class Gate:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, routes: list[Route], settings: ServerSettings, metrics: ServerMetrics) -> None:
        """Let requests for `app`, which has `routes`, through."""
        self._app = app
        self._routes = routes
        self._metrics = metrics
        self._max_connections = settings.max_connections
        self._token = None if settings.token is None else settings.token.encode()
        self._names = {*_LOOPBACK_NAMES, settings.host.lower()}
        if settings.advertise is not None:
            self._names.add(settings.advertise.lower())
        if not is_loopback(settings.host):
            self._names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        account = _Account(scope, receive, send)
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refuse(refusal)(scope, account.receive, account.send)
            else:
                await self._app(scope, account.receive, account.send)
        except ClientGoneError:
            account.status = CLIENT_LEFT
        finally:
            route = self._route(scope)
            account.log(route)
            self._metrics.request(route, account.status)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if not self._is_our_name(headers.getlist("host"), scope):
            # another site's page in a browser here, by a name of its own that leads to this address
            return Refusal("unauthorized", "the Host header names no address of this server (--advertise)", status=403)
        connection = scope.setdefault("state", {}).get("connection")
        if connection is not None and len(connection.connections) > self._max_connections:
            close = {"connection": "close", "retry-after": "5"}
            return Refusal("busy", f"more than {self._max_connections} connections are open", headers=close)
        if scope["path"] != _OPEN_TO_ALL and not self._knows_token(headers.getlist("authorization")):
            reason = "this server asks for its token: Authorization: Bearer TOKEN"
            return Refusal("unauthorized", reason, headers={"www-authenticate": "Bearer"})
        return None

    def _is_our_name(self, hosts: list[str], scope: Scope) -> bool:
        """Any port: requests come through tunnels and proxies, and names are what an attacker cannot choose."""
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        server = scope.get("server")
        return name in self._names or (server is not None and name == str(server[0]).lower())

    def _knows_token(self, said: list[str]) -> bool:
        if self._token is None:
            return True
        if len(said) != 1 or len(said[0]) > _MAX_TOKEN_BYTES:
            return False
        scheme, _, token = said[0].partition(" ")
        return (
            hmac.compare_digest(token.strip().encode("latin-1", "replace"), self._token) and scheme.lower() == "bearer"
        )

    def _route(self, scope: Scope) -> str:
        """Method and pattern; of unknown paths nothing is kept."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return f"{scope['method']} {route.path}"
        return "other"


class _Account:
    """Counts what goes through one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = CLIENT_LEFT
        self._scope, self._receive, self._send = scope, receive, send
        self._received_bytes = self._sent_bytes = 0
        self._begin = time.monotonic()

    async def receive(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        self._sent_bytes += len(message.get("body", b""))

    def log(self, route: str) -> None:
        client = self._scope.get("client")
        log_request(
            f"{client[0]}:{client[1]}" if client else "unknown",
            self._scope.get("state", {}).get("label", ""),
            route,
            self.status,
            self._received_bytes,
            self._sent_bytes,
            time.monotonic() - self._begin,
        )
