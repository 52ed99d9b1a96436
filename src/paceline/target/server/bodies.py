"""Bodies in and out: bounded, timed, checked; and whether the client is still there."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from paceline.errors import DamagedError
from paceline.schema.protocol import CHECKSUM_HEADER
from paceline.schema.wire import checksum
from paceline.target.server.answers import Refusal

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 512 << 10
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


class ClientGoneError(Exception):
    """The client closed the connection, or takes nothing any more."""


async def read_body(
    scope: Scope, receive: Receive, max_bytes: int, timeout_s: float, checksum_required: bool = False
) -> bytearray:
    """A request's whole body, proved to be what was sent if it says its checksum.

    Raises:
        Refusal: longer than `max_bytes`, not here within `timeout_s`, damaged, or without a checksum that is required.
        ClientGoneError: the connection ended first.
    """
    headers = Headers(scope=scope)
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(announced, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in _parts(receive):
                body += part
                if len(body) > max_bytes:
                    raise _too_large(f"more than {max_bytes}", max_bytes)
    except TimeoutError as error:
        raise Refusal(
            "damaged",
            f"{len(body)} bytes of the request's body came within {timeout_s:g} s, not all of it",
            status=408,
            headers={"connection": "close"},
        ) from error
    _check_sum(headers, body, checksum_required)
    return body


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _too_large(num: str, max_bytes: int) -> Refusal:
    # the connection stays: uvicorn throws the rest of the body away, and the client gets to read why
    return Refusal("wrong_request", f"a body of {num} bytes; this server takes {max_bytes} here", status=413)


def _check_sum(headers: Headers, body: bytearray, required: bool) -> None:
    said = headers.get(CHECKSUM_HEADER)
    if said is None:
        if required:
            raise DamagedError(f"a row request needs the header {CHECKSUM_HEADER}: xxh3-64 of the body, 16 hex digits")
        return
    if not _CHECKSUM.fullmatch(said):
        raise DamagedError(f"{CHECKSUM_HEADER} is no 16 hex digits")
    found = checksum(memoryview(body))
    if not hmac.compare_digest(found, said):
        raise DamagedError(f"the request's body has checksum {found}, {said} was sent with it: send it again")


async def until_gone(receive: Receive) -> None:
    """Return when the client closes the connection, or has the whole reply."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_body(scope: Scope, send: Send, parts: Iterable[bytes | memoryview], stall_s: float) -> None:
    """Send a body in pieces, no faster than the client takes them; `finish_body` ends it.

    The pieces are copies: whatever becomes of the connection, nothing refers to `parts` afterwards.

    Raises:
        ClientGoneError: the client took nothing for `stall_s`; its connection is cut.
    """
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            await _send(scope, send, bytes(view[start : start + _CHUNK_BYTES]), stall_s)
    # an empty piece waits until the network has what came before
    await _send(scope, send, b"", stall_s)


async def finish_body(send: Send, gone: asyncio.Task[None]) -> None:
    """Say that the body is complete.

    Raises:
        ClientGoneError: the client has left (`gone` is done).
    """
    await asyncio.sleep(0)  # whoever watches the connection hears of its end first
    if gone.done():
        raise ClientGoneError
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(scope: Scope, send: Send, piece: bytes, stall_s: float) -> None:
    message = {"type": "http.response.body", "body": piece, "more_body": True}
    try:
        async with asyncio.timeout(stall_s):
            await send(message)
    except TimeoutError as error:
        logger.warning("%s took nothing of a reply for %g s: its connection is cut", scope.get("client"), stall_s)
        cut_off(scope)
        await asyncio.sleep(0)  # the connection's end is noticed first
        raise ClientGoneError from error


async def send_head(send: Send, status: int, headers: dict[str, str]) -> None:
    """Status and headers of a reply."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


def cut_off(scope: Scope) -> None:
    """Close the client's connection at once, whatever it still has to take."""
    connection: Any = scope.get("state", {}).get("connection")
    if connection is not None:
        connection.transport.abort()
