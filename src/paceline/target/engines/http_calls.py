"""JSON calls to an engine's HTTP server, each on a connection of its own, ended together."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from paceline.errors import TargetError, TransportError

ENGINE_KEY = "PACELINE_ENGINE_KEY"
"""The variable with the key of an engine that somebody else has started."""
_HEALTH_S = 5.0


class EngineCalls:
    """Any number of threads may call at the same time."""

    def __init__(self, name: str, url: str, key: str = "", timeout_s: float = 600.0) -> None:
        """Connect to nothing yet.

        Args:
            name: for messages.
            url: http(s)://HOST:PORT
            key: a bearer token; "" where the server asks for none.
            timeout_s: for one call.
        """
        self.name, self.timeout_s = name, timeout_s
        self._url = urlsplit(url)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self.closed = False

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON.

        Raises:
            TransportError: no answer, or one of 5xx; asking again, or another server, can help.
            TargetError: the server refused.
        """
        # A new connection each time: servers close those idle for some seconds, at a moment that no client can see.
        connection = self._connect(self.timeout_s)
        try:
            connection.connect()
            with self._lock:
                if self.closed:
                    raise TransportError(f"{self.name}: the connection was closed")
                self._open.add(connection)
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status >= 500:
                raise TransportError(f"{self.name} failed ({response.status}): {_short(content)}")
            if response.status in (401, 403):
                raise TargetError(
                    f"{self.name} refused the key ({response.status}): set {ENGINE_KEY} to the one it has"
                )
            if response.status != 200:
                raise TargetError(f"{self.name} refused {path} ({response.status}): {_short(content)}")
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransportError(f"{self.name} did not answer {path} ({type(error).__name__}: {error})") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def is_healthy(self, path: str = "/health") -> bool:
        """Whether the server answers `path` with 200 within 5 s."""
        connection = self._connect(_HEALTH_S)
        try:
            connection.request("GET", path, headers=self._headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """End the calls that are out; their threads see a TransportError. Safe to call twice."""
        with self._lock:
            self.closed = True
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that opens when it is used."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self._url.netloc, timeout=timeout_s)


def _short(content: bytes) -> str:
    return content[:400].decode(errors="replace")
