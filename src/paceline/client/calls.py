"""What one server can be asked, as functions: each sends one request, proves the reply, and raises what went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor

from paceline.client.http_connections import HttpReply, HttpServer
from paceline.config.placement import PoolConfig, TransportConfig
from paceline.errors import (
    AuthorizationError,
    CaptureMismatchError,
    DamagedError,
    HandshakeError,
    PacelineError,
    ServerBusyError,
    ServerFailedError,
    ServerLostError,
    SessionLostError,
    WireError,
)
from paceline.schema.protocol import (
    CHECKSUM_HEADER,
    MAX_CONTROL_BYTES,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    SESSION_KEY_HEADER,
    ErrorKind,
    ErrorReply,
    ReplyHeader,
    RowsAsked,
    ServerInfo,
    SessionReply,
    SessionRequest,
    StoreCall,
    StoreReply,
)
from paceline.schema.wire import LENGTH_BYTES, checksum, decode_reply_head, head_length
from paceline.transport.base import JSON, SAFETENSORS

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_WEIGHTS_BYTES = 64 << 30
_LONGEST_GOODBYE_S = 5.0
_OK = 200
_UNAUTHORIZED = (401, 403)
_ERRORS: dict[ErrorKind, type[PacelineError]] = {
    "busy": ServerBusyError,
    "damaged": DamagedError,
    "wrong_request": WireError,
    "mismatch": CaptureMismatchError,
    "handshake": HandshakeError,
    "out_of_memory": ServerFailedError,
    "engine": ServerFailedError,
    "unauthorized": AuthorizationError,
    "unknown_session": SessionLostError,
    "not_found": WireError,
    "stopping": ServerLostError,
}
_logger = logging.getLogger(__name__)
MessageT = TypeVar("MessageT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class RowReply:
    """A server's answer to a row."""

    header: ReplyHeader
    body: RowBody | None
    """The tensors, not yet read, and the proof that they and `header` are undamaged; None: `header` is proved."""


@dataclass(frozen=True, slots=True)
class RowBody:
    """The rest of a reply's body, behind its head (transport.base.Body)."""

    _reply: HttpReply

    def read_into(self, view: memoryview) -> None:
        if view.nbytes != self._reply.num_left:
            raise DamagedError(f"a row of {self._reply.num_left} bytes, {view.nbytes} are expected")
        self._reply.read_into(view)
        self._reply.verify()

    def discard(self) -> None:
        """Read the rest and keep nothing; DamagedError if the body is not what was sent."""
        self._reply.discard()
        self._reply.verify()


class ServerCalls:
    """Calls to one server; thread-safe.

    All raise ServerLostError when the server cannot be reached or the connection broke, AuthorizationError for a
    wrong token, DamagedError for a reply that was damaged, and the error that the server answers.
    """

    def __init__(
        self,
        url: str,
        transport: TransportConfig,
        pool: PoolConfig,
        *,
        token: str | None = None,
        tls_ca: str | None = None,
    ) -> None:
        """Connect to nothing yet; `url` is http://HOST:PORT or https://HOST:PORT."""
        self._row_timeout_s = transport.row_timeout_s
        self._control_timeout_s = transport.stall_timeout_s
        self._health_timeout_s = pool.health_timeout_s
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # a row's reply that is sent twice must not be taken for the answer to a control call
        self._control_server, self._row_server = (
            HttpServer(
                url,
                headers,
                connect_timeout_s=pool.connect_timeout_s,
                stall_timeout_s=transport.stall_timeout_s,
                tls_ca=tls_ca,
            )
            for _ in range(2)
        )

    @property
    def url(self) -> str:
        return self._control_server.url

    def check_health(self) -> None:
        """Return if the server answers /healthz within `pool.health_timeout_s`, whatever it says."""
        with self._control_server.call("GET", "/healthz", wait_s=self._health_timeout_s) as reply:
            reply.read(MAX_CONTROL_BYTES)

    def info(self) -> ServerInfo:
        """What the server says about itself and its target.

        Raises:
            HandshakeError: it speaks another version of the protocol.
        """
        body = self._control("GET", "/v1/info")
        theirs = _json(self.url, body).get("protocol")
        if theirs != PROTOCOL_VERSION:
            raise HandshakeError(
                f"{self.url} speaks version {theirs} of the protocol, this trainer speaks {PROTOCOL_VERSION}: "
                "install the same version of paceline on both sides"
            )
        return self._parse(ServerInfo, body)

    def open_session(self, request: SessionRequest) -> SessionReply:
        """A new session."""
        return self._parse(SessionReply, self._control("POST", "/v1/sessions", _message(request)))

    def renew(self, session: SessionReply) -> None:
        """Lengthen the session's lease.

        Raises:
            SessionLostError: the server does not know it any more.
        """
        self._control("POST", f"{_path(session)}/renew", session=session)

    def end(self, session: SessionReply) -> None:
        """Release the session; waits a few seconds at most."""
        timeout_s = min(_LONGEST_GOODBYE_S, self._control_timeout_s)
        self._control("DELETE", _path(session), session=session, wait_s=timeout_s)

    def store(self, session: SessionReply, call: StoreCall) -> StoreReply:
        """One step of the rendezvous of a channel."""
        body = self._control("POST", f"{_path(session)}/store", _message(call), session=session)
        return self._parse(StoreReply, body)

    @contextmanager
    def row(self, session: SessionReply, request: bytes) -> Iterator[RowReply]:
        """The answer to a row request (`encode_request`), to be read inside the block.

        Raises:
            ServerBusyError, ServerFailedError, SessionLostError: ask again, later or elsewhere.
            TransportError: no answer within `transport.row_timeout_s`.
            ConnectionBrokenError: the connection ended before the reply began.
        """
        with self._row_server.call(
            "POST",
            f"{_path(session)}/rows",
            request,
            {**_key(session), "Content-Type": SAFETENSORS, CHECKSUM_HEADER: checksum(request)},
            wait_s=self._row_timeout_s,
        ) as reply:
            if reply.status != _OK:
                raise self._error(reply)
            if _content_type(reply) == JSON:
                text = reply.read(MAX_HEADER_BYTES)
                reply.verify()
                yield RowReply(self._parse(ReplyHeader, text), None)
                return
            yield RowReply(_read_head(reply), RowBody(reply))

    def weights(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """The target's weight `name` ("embedding", "lm_head", "lm_head_bias"), or some of its rows, in their order."""
        method, body = "GET", b""
        if rows is not None:
            method, body = "POST", _message(RowsAsked(rows=list(rows)))
        content = self._control(
            method, f"/v1/weights/{quote(name)}", body, wait_s=self._row_timeout_s, max_bytes=_MAX_WEIGHTS_BYTES
        )
        try:
            tensors = tensors_of(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise WireError(f"{self.url} answered the weight {name!r} with no safetensors file: {error}") from error
        if len(tensors) != 1:
            raise WireError(f"{self.url} answered the weight {name!r} with tensors {sorted(tensors)[:8]}, not one")
        return next(iter(tensors.values()))

    def tokenizer(self) -> dict[str, str]:
        """The files of the target's tokenizer, content by name; data only."""
        body = self._control("GET", "/v1/tokenizer", wait_s=self._row_timeout_s, max_bytes=_MAX_TOKENIZER_BYTES)
        files = _json(self.url, body)
        for name, text in files.items():
            if not isinstance(text, str) or not name or name.startswith(".") or set(name) & set("/\\\0"):
                raise WireError(f"{self.url} sent {name!r} as a file of its tokenizer")
        return files

    def break_off(self) -> None:
        """Calls under way fail now."""
        self._row_server.break_off()
        self._control_server.break_off()

    def close(self) -> None:
        """End all connections; calls under way and later ones fail with ServerLostError. Safe to call twice."""
        self._row_server.close()
        self._control_server.close()

    def _control(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        session: SessionReply | None = None,
        wait_s: float | None = None,
        max_bytes: int = MAX_CONTROL_BYTES,
    ) -> bytes:
        """The proved body of the reply to one control call."""
        headers = {} if session is None else _key(session)
        if body:
            headers |= {"Content-Type": JSON, CHECKSUM_HEADER: checksum(body)}
        with self._control_server.call(method, path, body, headers, wait_s=wait_s or self._control_timeout_s) as reply:
            if reply.status // 100 != _OK // 100:
                raise self._error(reply)
            content = reply.read(max_bytes)
            reply.verify()
        return content

    def _error(self, reply: HttpReply) -> PacelineError:
        """What a reply says that is not 2xx."""
        try:
            body = reply.read(MAX_CONTROL_BYTES)
            reply.verify()
            told = ErrorReply.model_validate_json(body)
        except (DamagedError, ValidationError) as error:
            if reply.status in _UNAUTHORIZED:  # something in between may say so, too
                return AuthorizationError(f"{self.url} refuses us (HTTP {reply.status}): {_REMEDY}")
            return DamagedError(f"{self.url} answered HTTP {reply.status}, and not what went wrong: {error}")
        message = f"{self.url}: {told.message}"
        if told.error == "busy":
            return ServerBusyError(message, _seconds(reply.header("Retry-After")))
        if told.error == "unauthorized":
            message += f"; {_REMEDY}"
        return _ERRORS[told.error](message)

    def _parse(self, kind: type[MessageT], body: bytes) -> MessageT:
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
            raise HandshakeError(
                f"{self.url} answers with no {kind.__name__} of this version: {told}; "
                "install the same version of paceline on both sides"
            ) from error


_REMEDY = "give the servers' token in placement.token_file or PACELINE_TOKEN"


def _read_head(reply: HttpReply) -> ReplyHeader:
    first = memoryview(bytearray(LENGTH_BYTES))
    reply.read_into(first)
    text = memoryview(bytearray(head_length(first)))
    reply.read_into(text)
    return decode_reply_head(text)


def _json(url: str, body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HandshakeError(f"{url} answers with no JSON: is it a server of paceline? {error}") from error
    if not isinstance(content, dict):
        raise HandshakeError(f"{url} answers with no table: is it a server of paceline?")
    return content


def _message(message: BaseModel) -> bytes:
    return message.model_dump_json().encode()


def _path(session: SessionReply) -> str:
    return f"/v1/sessions/{session.session}"


def _key(session: SessionReply) -> dict[str, str]:
    return {SESSION_KEY_HEADER: session.key}


def _content_type(reply: HttpReply) -> str:
    return (reply.header("Content-Type") or "").split(";")[0].strip().lower()


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
