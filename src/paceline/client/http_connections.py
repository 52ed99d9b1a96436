"""HTTP to one server: connections that are kept and used again, replies read straight into ready memory.

The standard library's client: it follows no redirect, asks no proxy, bounds what it takes for headers, and reads a
body into the memory it is given.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

import xxhash

from paceline.errors import ConfigError, DamagedError, ServerLostError, TransportError
from paceline.schema.protocol import CHECKSUM_HEADER

_PIECE_BYTES = 1 << 20
"""Read and hashed at a time: what was read is still in the cache when it is hashed."""
_STALE_AFTER_S = 1.0
"""A connection unused for so long may have been closed by a server that had enough of waiting."""


class ConnectionBrokenError(ServerLostError):
    """A connection ended before a reply began; whether the server lives is not known."""


class HttpServer:
    """One server, and the connections to it; as many calls at a time as there are threads that make them."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
        tls_ca: str | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: http://HOST:PORT or https://HOST:PORT, with a path in front of ours if need be.
            headers: sent with every request.
            connect_timeout_s: until a connection stands.
            stall_timeout_s: between bytes, while a request is sent or a reply has begun.
            tls_ca: a file of certificates to trust; None takes the system's.

        Raises:
            ConfigError: a url or a file of certificates that cannot work.
        """
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no address of a server: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(f"{url!r} is no address of a server: write http://HOST:PORT or https://HOST:PORT")
        self._host, self._port, self._path = parts.hostname, port, parts.path
        self._tls = _tls_context(tls_ca) if parts.scheme == "https" else None
        self._headers = dict(headers)
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False

    @contextmanager
    def call(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *, wait_s: float
    ) -> Iterator[HttpReply]:
        """The reply to one request, to be read inside the block. What it leaves unread ends the connection.

        Args:
            wait_s: until the reply begins.

        Raises:
            ServerLostError: no connection could be made; ConnectionBrokenError: it ended before the reply began.
            TransportError: no reply within `wait_s`, or the request could not be sent.
            DamagedError: what came is no HTTP.
        """
        headers = {**self._headers, **(headers or {})}
        connection, reply = self._ask(method, self._path + path, body, headers, wait_s)
        try:
            yield reply
        finally:
            self._put_back(connection, reusable=reply.is_read and not reply.will_close)

    def break_off(self) -> None:
        """Calls under way fail now, on whichever thread they wait."""
        with self._lock:
            connections = [*self._busy]
        for connection in connections:
            connection.break_off()

    def close(self) -> None:
        """End all connections: calls under way and later ones fail with ServerLostError. Safe to call twice."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self.break_off()
        for connection in idle:
            connection.close()

    def _ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], wait_s: float
    ) -> tuple[_Connection, HttpReply]:
        """Ask on a kept connection, or a fresh one; one that proves to be stale is replaced once."""
        connection = self._take_idle()
        if connection is not None:
            idle_s = time.monotonic() - connection.used
            try:
                return connection, self._ask_on(connection, method, path, body, headers, wait_s)
            except ConnectionBrokenError:
                if idle_s < _STALE_AFTER_S or self._closed or connection.broken_off:
                    raise
        connection = self._connect()
        return connection, self._ask_on(connection, method, path, body, headers, wait_s)

    def _ask_on(
        self, connection: _Connection, method: str, path: str, body: bytes, headers: Mapping[str, str], wait_s: float
    ) -> HttpReply:
        try:
            return connection.ask(method, path, body, headers, wait_s)
        except BaseException:
            self._put_back(connection, reusable=False)
            raise

    def _take_idle(self) -> _Connection | None:
        while True:
            with self._lock:
                self._check_open()
                if not self._idle:
                    return None
                connection = self._idle.pop()
                self._busy.add(connection)
            if connection.is_alive():
                return connection
            self._put_back(connection, reusable=False)

    def _connect(self) -> _Connection:
        connection = _Connection(self.url, self._stall_timeout_s)
        with self._lock:
            self._check_open()
            self._busy.add(connection)
        try:
            connection.connect(self._host, self._port, self._connect_timeout_s, self._tls)
        except BaseException:
            self._put_back(connection, reusable=False)
            raise
        return connection

    def _put_back(self, connection: _Connection, reusable: bool) -> None:
        connection.used = time.monotonic()
        with self._lock:
            self._busy.discard(connection)
            reusable = reusable and not self._closed and not connection.broken_off
            if reusable:
                self._idle.append(connection)
        if not reusable:
            connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerLostError(f"the connection to {self.url} is closed")


class HttpReply:
    """A reply that has begun: its status, its headers, and its body, hashed as it is read."""

    def __init__(self, response: http.client.HTTPResponse, url: str, stall_timeout_s: float) -> None:
        self._response = response
        self._url = url
        self._stall_timeout_s = stall_timeout_s
        self._digest = xxhash.xxh3_64()
        self.status = response.status
        self.will_close = response.will_close
        length = response.length  # None for a body in chunks, or one that ends with the connection
        if length is None:
            raise DamagedError(f"{url} answered without saying how many bytes follow")
        self.num_left = length
        """Bytes of the body not yet read."""
        if not length:
            response.close()

    @property
    def is_read(self) -> bool:
        return self.num_left == 0

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes of the body.

        Raises:
            DamagedError: the body ends before.
            TransportError: it stands still for too long.
        """
        done, num_bytes = 0, view.nbytes
        if num_bytes > self.num_left:
            raise DamagedError(f"{self._url} sends {self.num_left} more bytes, {num_bytes} are expected")
        while done < num_bytes:
            piece = view[done : done + _PIECE_BYTES]
            try:
                num_read = self._response.readinto(piece)
            except TimeoutError as error:
                raise TransportError(
                    f"a reply of {self._url} stood still for {self._stall_timeout_s:g} s with {self.num_left} bytes "
                    "missing (transport.stall_timeout_s)"
                ) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                # ValueError: the file was closed under the reader
                raise DamagedError(
                    f"a reply of {self._url} broke off, {self.num_left} bytes missing: {error}"
                ) from error
            if not num_read:
                raise DamagedError(f"a reply of {self._url} ended early, {self.num_left} bytes are missing")
            self._digest.update(piece[:num_read])
            done += num_read
            self.num_left -= num_read

    def read(self, max_bytes: int) -> bytes:
        """The rest of the body.

        Raises:
            DamagedError: more than `max_bytes`, or it ends before.
        """
        if self.num_left > max_bytes:
            raise DamagedError(f"{self._url} announces {self.num_left} bytes, at most {max_bytes} are expected")
        body = bytearray(self.num_left)
        self.read_into(memoryview(body))
        return bytes(body)

    def discard(self) -> None:
        """Read the rest of the body and keep nothing of it."""
        scratch = memoryview(bytearray(min(_PIECE_BYTES, self.num_left)))
        while self.num_left:
            self.read_into(scratch[: min(len(scratch), self.num_left)])

    def verify(self) -> None:
        """Prove that the whole body, now read, is what was sent.

        Raises:
            DamagedError: its checksum is another one, or missing.
        """
        assert self.is_read, "a body is proved when it is read"
        sent, received = self.header(CHECKSUM_HEADER), self._digest.hexdigest()
        if sent != received:
            raise DamagedError(f"a reply of {self._url} has checksum {received}, {sent} was sent")


class _Connection:
    """One connection, used by one thread at a time; any other may break it off."""

    def __init__(self, url: str, stall_timeout_s: float) -> None:
        self._url = url
        self._stall_timeout_s = stall_timeout_s
        self._http: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.used = time.monotonic()
        self.broken_off = False

    def connect(self, host: str, port: int | None, timeout_s: float, tls: ssl.SSLContext | None) -> None:
        if tls is None:
            self._http = http.client.HTTPConnection(host, port, timeout=timeout_s)
        else:
            self._http = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)
        self._http.auto_open = 0  # a lost connection is ours to judge
        self._http.response_class = partial(_Response, self._stall_timeout_s)  # type: ignore[assignment]
        try:
            self._http.connect()
        except (OSError, http.client.HTTPException) as error:
            raise ServerLostError(f"{self._url} takes no connection: {_reason(error)}") from error
        with self._lock:
            self._socket = self._http.sock
            if self.broken_off:
                raise ServerLostError(f"the connection to {self._url} was given up")

    def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str], wait_s: float) -> HttpReply:
        assert self._http is not None
        connected = self._http.sock
        try:
            connected.settimeout(self._stall_timeout_s)
            self._http.request(method, path, body or None, dict(headers))
        except TimeoutError as error:
            raise TransportError(f"{self._url} took nothing of a request for {self._stall_timeout_s:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ConnectionBrokenError(f"the connection to {self._url} broke: {_reason(error)}") from error
        try:
            connected.settimeout(wait_s)
            response = self._http.getresponse()
        except TimeoutError as error:
            raise TransportError(f"{self._url} did not answer {method} {path} for {wait_s:g} s") from error
        except OSError as error:  # http.client's RemoteDisconnected is one
            raise ConnectionBrokenError(f"the connection to {self._url} broke: {_reason(error)}") from error
        except (http.client.HTTPException, ValueError) as error:
            raise DamagedError(f"what {self._url} answered is no HTTP: {_reason(error)}") from error
        return HttpReply(response, self._url, self._stall_timeout_s)

    def is_alive(self) -> bool:
        """Whether nothing has come since the last reply: an end, or what nobody asked for."""
        assert self._http is not None
        if self.broken_off or self._http.sock is None:
            return False
        poll = select.poll()
        poll.register(self._http.sock, select.POLLIN)
        return not poll.poll(0)

    def break_off(self) -> None:
        with self._lock:
            self.broken_off = True
            if self._socket is not None:
                _shut_down(self._socket)

    def close(self) -> None:
        with self._lock:
            self._socket = None
        if self._http is not None:
            self._http.close()


class _Response(http.client.HTTPResponse):
    """Waits for the first byte under the connection's time-out, for all others under one of its own.

    `getresponse` reads the whole head: one that began and stands still must not be waited for as long as one that has
    not begun.
    """

    def __init__(self, stall_timeout_s: float, connected: socket.socket, method: str | None = None) -> None:
        super().__init__(connected, method=method)
        self._connected = connected
        self._stall_timeout_s = stall_timeout_s

    def begin(self) -> None:
        self.fp.peek(1)
        self._connected.settimeout(self._stall_timeout_s)
        try:
            super().begin()
        except TimeoutError as error:
            raise ConnectionResetError(f"its answer stood still for {self._stall_timeout_s:g} s") from error


def _shut_down(connected: socket.socket) -> None:
    """Wake whoever reads or writes; the file descriptor stays its thread's to close."""
    try:
        # TLS has a shutdown of its own, which takes the object apart under the reader
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return  # it is not connected any more


def _tls_context(tls_ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=tls_ca)
    except OSError as error:
        raise ConfigError(f"placement.tls_ca = {tls_ca!r} holds no certificates: {error}") from error


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
