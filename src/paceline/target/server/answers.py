"""Replies of the control plane: JSON with its checksum, and every error as an ErrorReply."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from paceline.errors import (
    AuthorizationError,
    CaptureMismatchError,
    ConfigError,
    DamagedError,
    HandshakeError,
    OutOfMemoryError,
    PacelineError,
    ServerBusyError,
    SessionLostError,
    StoppedError,
    WireError,
)
from paceline.schema.protocol import CHECKSUM_HEADER, ErrorKind, ErrorReply
from paceline.schema.wire import checksum
from paceline.transport.base import JSON

_MAX_MESSAGE = 2000
_STATUS: Mapping[ErrorKind, int] = {
    "busy": 429,
    "damaged": 400,
    "wrong_request": 400,
    "mismatch": 422,
    "handshake": 409,
    "out_of_memory": 500,
    "engine": 500,
    "unauthorized": 401,
    "unknown_session": 404,
    "not_found": 404,
    "stopping": 503,
}
_KINDS: tuple[tuple[type[PacelineError], ErrorKind], ...] = (
    (CaptureMismatchError, "mismatch"),
    (ConfigError, "mismatch"),
    (HandshakeError, "handshake"),
    (WireError, "wrong_request"),
    (DamagedError, "damaged"),
    (AuthorizationError, "unauthorized"),
    (ServerBusyError, "busy"),
    (SessionLostError, "unknown_session"),
    (OutOfMemoryError, "out_of_memory"),
    (StoppedError, "stopping"),
)


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An ErrorReply on its way to the client."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        status: int | None = None,
        position: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`status` is what the protocol gives `kind` unless HTTP has a better one."""
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message[:_MAX_MESSAGE]
        self.status = status or _STATUS[kind]
        self.position = position
        self.headers = dict(headers or {})


def refusal_of(error: BaseException, position: int | None = None) -> Refusal:
    """What a client is told about `error`: no traceback and nothing of ours but the message."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PacelineError):
        kind: ErrorKind = next((kind for known, kind in _KINDS if isinstance(error, known)), "engine")
        return Refusal(kind, str(error), position=position)
    message = f"the server failed: {type(error).__name__}; its log has the rest"
    return Refusal("engine", message, position=position)


def answer(message: BaseModel, status: int = 200) -> Response:
    """A message as a whole reply."""
    return bytes_answer(message.model_dump_json().encode(), JSON, status)


def refuse(refusal: Refusal) -> Response:
    """The ErrorReply of a refusal."""
    message = ErrorReply(error=refusal.kind, message=refusal.message, position=refusal.position)
    response = answer(message, refusal.status)
    response.headers.update(refusal.headers)
    return response


def bytes_answer(body: bytes, content_type: str, status: int = 200) -> Response:
    """A reply that fits in memory, with its checksum."""
    return Response(body, status, {CHECKSUM_HEADER: checksum(body)}, content_type)


def describe_invalid(error: ValidationError) -> str:
    """Which fields of a message are wrong and why, without what was sent: it may hold a secret."""
    problems = error.errors(include_input=False, include_url=False, include_context=False)[:3]
    return "; ".join(f"{'.'.join(map(str, one['loc']))[:100] or 'body'}: {one['msg'][:200]}" for one in problems)
